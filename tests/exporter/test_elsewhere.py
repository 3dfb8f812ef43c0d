"""A call in another Python: what it gives, what it says on the way, how it fails; and Optimum, called so."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onnx_lora import errors
from onnx_lora.errors import ExportError, InternalError, MissingDependencyError, ModelError, SeveralAdaptersError
from onnx_lora.exporter import Pipeline, export, verify
from onnx_lora.exporter.elsewhere import call_in
from onnx_lora.exporter.frontends.optimum_python import VARIABLE
from tests.golden.versions import folder_of
from tests.support.exporters import HAS_OPTIMUM


def add(one: int, other: int, *, told: Callable[[str, int], object] = lambda *_: None) -> int:
    sys.stdout.write("what is printed is no answer\n")
    logging.getLogger("onnx_lora.of_a_child").warning("%d and %d", one, other)
    told("one", one)
    told("other", other)
    return one + other


def refuse() -> None:
    raise ModelError("cannot be", path="it", problems=["one", "another"])


def lack() -> None:
    raise MissingDependencyError("needs it: pip install it")


def fail() -> None:
    raise ZeroDivisionError("of nobody's making")


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def leave() -> None:
    sys.stderr.write("last words\n")
    os._exit(7)


def wait(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


@pytest.fixture(autouse=True)
def _tests_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def test_it_gives_what_the_function_gives_and_calls_back_in_order(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, int]] = []
    assert call_in(sys.executable, add, 2, 3, told=lambda *said: heard.append(said)) == 5
    assert heard == [("one", 2), ("other", 3)]
    assert [record.getMessage() for record in caplog.records] == ["2 and 3"]
    assert call_in(None, add, 2, 3) == 5


def test_an_error_of_ours_is_raised_as_it_was() -> None:
    with pytest.raises(ModelError) as caught:
        call_in(sys.executable, refuse)
    assert (caught.value.message, caught.value.path, caught.value.problems) == ("cannot be", "it", ("one", "another"))


def test_what_is_missing_there_is_said_with_the_python_that_lacks_it() -> None:
    with pytest.raises(MissingDependencyError, match="needs it: pip install it") as caught:
        call_in(sys.executable, lack)
    assert caught.value.message.startswith(f"in {sys.executable}: ")


def test_another_error_is_a_fault_of_ours() -> None:
    with pytest.raises(InternalError, match="of nobody's making"):
        call_in(sys.executable, fail)


@pytest.mark.parametrize(
    "function, args, message",
    [(die, (signal.SIGKILL,), "was killed by signal 9"), (leave, (), "ended with 7: last words")],
)
def test_a_process_that_dies_is_told(function: Callable[..., None], args: tuple[int, ...], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        call_in(sys.executable, function, *args)


def test_what_a_callback_raises_ends_the_process(tmp_path: Path) -> None:
    def cancel(*_: object) -> None:
        raise BrokenPipeError("the caller's own")

    with pytest.raises(BrokenPipeError, match="the caller's own"):
        call_in(sys.executable, add, 2, 3, told=cancel)


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    script = (
        "import signal, sys\n"
        "from onnx_lora.exporter.elsewhere import call_in\n"
        "from tests.exporter.test_elsewhere import wait\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"call_in(sys.executable, wait, {str(tmp_path / 'pid')!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    "program, message",
    [
        ("#!/bin/sh\necho no answer\n", "ended with 0"),
        ("#!/bin/sh\necho \"x: No module named 'onnx_lora'\" >&2; exit 1\n", "must have onnx-lora in this version"),
        (None, "cannot be run"),
    ],
)
def test_what_is_no_python_with_this_library_is_named(tmp_path: Path, program: str | None, message: str) -> None:
    python = tmp_path / "python"
    if program is not None:
        python.write_text(program)
        python.chmod(0o755)
    with pytest.raises((ExportError, MissingDependencyError), match=message) as caught:
        call_in(str(python), add, 2, 3)
    assert str(python) in str(caught.value)


def test_another_version_of_this_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lora.__version__", "9.9")
    with pytest.raises(MissingDependencyError, match=r"must have 9\.9"):
        call_in(sys.executable, add, 2, 3)


def test_every_error_goes_from_one_process_to_another() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if not isinstance(kind, type):
            continue
        error = kind("m", names=["a"]) if kind is SeveralAdaptersError else kind("m", path="p", problems=["x"])
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (kind, str(error), vars(error))


# --- Optimum in another Python -------------------------------------------------------------------


@pytest.mark.skipif(HAS_OPTIMUM, reason="Optimum is here")
@pytest.mark.skipif(not Path(os.environ.get(VARIABLE, "")).is_file(), reason=f"needs {VARIABLE}: make setup-optimum")
def test_optimum_exports_and_compares_in_its_own_python(tmp_path: Path) -> None:
    checkpoint = folder_of("vit", 4)
    told: list[Any] = []
    listen: dict[str, Any] = {"progress": lambda what, *_: told.append(what), "verified": told.append}
    package = export(checkpoint, tmp_path / "package", via="optimum", **listen)
    source = package.manifest.source
    assert (source["made_by"], source["transformers"].partition(".")[0]) == ("optimum", "4")
    assert {"export", "verify"} <= {what for what in told if isinstance(what, str)}
    assert all(entry.agrees for entry in told[-1])
    assert all(entry.agrees for entry in verify(package, checkpoint))
    with pytest.raises(ModelError, match="must name modules"):
        export(checkpoint, tmp_path / "other", via="optimum", targets=["no_such"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


@pytest.mark.skipif(HAS_OPTIMUM, reason="Optimum is here")
def test_without_optimum_both_cures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for source, options in ((folder_of("vit", 4), {"via": "optimum"}), (Pipeline(tmp_path), {})):
        with pytest.raises(MissingDependencyError, match=r"onnx-lora\[diffusion,cpu\].*make setup-optimum") as caught:
            export(source, tmp_path / "out", **options)
        assert VARIABLE in str(caught.value)
