"""What a device installs: numpy, safetensors and ONNX Runtime run packages, and what else is missing is named.

The wheel is built, and installed into an environment of its own without this project's other libraries. That needs the
package index; offline these tests are skipped, saying so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_lora
from onnx_lora import (
    AdapterSession,
    Package,
    Requantize,
    Sampling,
    TextGenerator,
    attach,
    bind,
    fold,
    read_adapter,
    write_bound,
)
from onnx_lora.demo import MODEL
from onnx_lora.demo_text import WRITER
from tests.support.numbers import assert_close

pytestmark = pytest.mark.slow

ROOT = Path(onnx_lora.__file__).parent.parent
USER = Path(__file__).parent / "typing" / "user.py"

# Of the wheel: 10.7 MB are the demo's two models and their adapters, which do not compress (`pyproject.toml` says why
# they are in it), the rest is source.
_LARGEST_WHEEL = 12_000_000  # bytes

ADAPTER = WRITER / "adapters" / "names"

# Runs on the device. Prints what came out of a call, or the error's text.
_CALLS = """
import json, sys
import numpy as np
import onnx_lora
from onnx_lora import MissingDependencyError

package, tasks, adapter, file, head, feeds, out = sys.argv[1:]
feeds = dict(np.load(feeds))

def switched():
    session = onnx_lora.AdapterSession(package)
    session.load_adapter("a", adapter)
    session.load_adapter("b", file)
    return [session.run(None, feeds, adapter=choice)[0].tolist() for choice in (None, "a", "b", ["a", None])]

def folded():
    return onnx_lora.fold(package, adapter, requantize=onnx_lora.Requantize()).run(None, feeds)[0].tolist()

def bound():
    return onnx_lora.bind(onnx_lora.read_adapter(adapter), onnx_lora.Package.open(package)).coverage.applied is not None

def written():
    return list(onnx_lora.TextGenerator(package).generate([11, 42, 7], sampling=onnx_lora.Sampling(4)).tokens)

calls = {
    "bind": bound,
    "switch": switched,
    "fold": folded,
    "write": written,
    "fold of a head of another width": lambda: onnx_lora.fold(tasks, head),
    "fold_to": lambda: onnx_lora.fold_to(package, adapter, out),
    "attach": lambda: onnx_lora.attach(package, out),
    "export": lambda: onnx_lora.export(package, out),
    "quantize": lambda: onnx_lora.quantize(package, out),
    "verify": lambda: onnx_lora.verify(package, package),
    "generate": lambda: onnx_lora.TextGenerator(package).generate("The king").text,
    "chat": lambda: onnx_lora.TextGenerator(package).chat([{"role": "user", "content": "Hello"}]).text,
}
found = {}
for name, call in calls.items():
    try:
        found[name] = call()
    except MissingDependencyError as error:
        found[name] = f"missing: {error}"
found["loaded"] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(found, default=str))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip([sys.executable], "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel's extra `cpu`, and nothing else."""
    folder = tmp_path_factory.mktemp("device")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    _pip([str(python)], "install", "--constraint", str(ROOT / "constraints.txt"), f"{wheel}[cpu]")
    return python


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    return attach(WRITER / "model", folder / "writer").path


@pytest.fixture(scope="module")
def answers(device: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("answers")
    write_bound(bind(read_adapter(ADAPTER), Package.open(package)), folder / "it.safetensors")
    np.savez(folder / "feeds.npz", **_feeds(package))
    tasks = attach(MODEL / "model.onnx", folder / "tasks").path
    arguments = [package, tasks, ADAPTER, folder / "it.safetensors", MODEL / "adapters" / "question"]
    arguments += [folder / "feeds.npz", folder / "out"]
    result = _run([str(device), "-c", _CALLS, *map(str, arguments)], folder)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _feeds(package: Path) -> dict[str, Any]:
    """Two rows of three tokens, and an empty cache."""
    ids = np.array([[11, 42, 7], [3, 5, 8]])
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    size = json.loads((package / "genai_config.json").read_text("utf-8"))["model"]["decoder"]["head_size"]
    for entry in AdapterSession(package).get_inputs():
        if entry.name.startswith("past_key_values"):
            feeds[entry.name] = np.zeros((2, entry.shape[1], 0, size), np.float32)
    return feeds


def _pip(python: list[str], *arguments: str) -> None:
    """Skips the test where the index cannot be reached."""
    command = [*python, "-m", "pip", "--disable-pip-version-check", "--retries", "1", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=_clean())
    said = result.stdout + result.stderr
    if result.returncode and any(sign in said for sign in ("NewConnectionError", "Name or service", "ConnectTimeout")):
        pytest.skip(f"needs the package index, and it cannot be reached: pip {arguments[0]}")
    assert result.returncode == 0, said[-3000:]


def _clean() -> dict[str, str]:
    """The environment without what would let a child find this folder's source."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=_clean(), capture_output=True, text=True, check=False, timeout=300)


def test_the_wheel_holds_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"onnx_lora/py.typed", "onnx_lora/demo_model/model.onnx"} <= names
    assert {name.partition("/")[0] for name in names} == {"onnx_lora", f"onnx_lora-{onnx_lora.__version__}.dist-info"}
    assert wheel.stat().st_size < _LARGEST_WHEEL


def test_a_device_gets_numpy_safetensors_and_onnx_runtime(device: Path, tmp_path: Path) -> None:
    listed = _run([str(device), "-m", "pip", "list", "--format", "json"], tmp_path)
    names = {entry["name"].lower() for entry in json.loads(listed.stdout)}
    theirs = {
        "flatbuffers",
        "packaging",
        "protobuf",
        "coloredlogs",
        "humanfriendly",
        "sympy",
        "mpmath",
    }  # ONNX Runtime's
    own = {"pip", "setuptools", "onnx-lora", "numpy", "safetensors", "onnxruntime"}
    assert own - {"pip", "setuptools"} <= names <= own | theirs


def test_a_device_runs_and_folds_as_here(answers: Mapping[str, Any], package: Path) -> None:
    session = AdapterSession(package)
    session.load_adapter("a", ADAPTER)
    feeds = _feeds(package)
    assert answers["bind"] is True
    base, adapter, converted, rows = (np.array(output, np.float32) for output in answers["switch"])
    expected = session.run(None, feeds, adapter="a")[0]
    assert_close(base, session.run(None, feeds)[0])
    assert_close(adapter, expected)
    assert_close(converted, expected)
    assert_close(rows, session.run(None, feeds, adapter=["a", None])[0])
    here = fold(package, ADAPTER, requantize=Requantize())
    assert_close(np.array(answers["fold"], np.float32), here.run(None, feeds)[0])
    assert answers["write"] == list(TextGenerator(package).generate([11, 42, 7], sampling=Sampling(4)).tokens)


@pytest.mark.parametrize(
    "call", ["fold of a head of another width", "fold_to", "attach", "export", "quantize", "verify", "generate", "chat"]
)
def test_what_is_missing_is_named_with_its_extra(answers: Mapping[str, Any], call: str) -> None:
    assert str(answers[call]).startswith("missing: "), answers[call]
    assert "pip install" in answers[call]


def test_a_device_loads_nothing_else(answers: Mapping[str, Any]) -> None:
    assert not {"onnx", "onnx_ir", "torch", "click", "rich", "tokenizers"} & set(answers["loaded"])


def test_the_command_without_its_libraries_is_one_line_and_an_exit_code(device: Path, tmp_path: Path) -> None:
    for command in ([str(device), "-m", "onnx_lora"], [str(device.parent / "onnx-lora")]):
        result = _run([*command, "--help"], tmp_path)
        assert (result.returncode, result.stdout) == (3, "")
        assert result.stderr == "error: the command onnx-lora needs click; install it: pip install 'onnx-lora[cli]'\n"


def test_a_strict_type_checker_reads_the_installed_types(device: Path, tmp_path: Path) -> None:
    """`py.typed` lies in the wheel: without it the checker would say that the package has no types."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", str(device)]
    file = tmp_path / "user.py"  # beside nothing of this project
    file.write_text(USER.read_text("utf-8"), "utf-8")
    command += ["--cache-dir", str(tmp_path / "cache"), str(file)]
    result = _run(command, tmp_path)
    assert "py.typed" not in result.stdout, result.stdout
    assert "import-untyped" not in result.stdout, result.stdout
    assert result.returncode == 0, result.stdout
