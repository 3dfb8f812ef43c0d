"""Many adapters converted in one run: resumable, one failure stops no other, the same bytes every time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import Package, bind, convert_all, read_adapter, write_adapter
from onnx_lora.adapters import Converted, ConvertedFolder
from onnx_lora.adapters.batch import convert
from onnx_lora.adapters.batch.collection import find_adapters
from onnx_lora.adapters.batch.records import FOLDER, Record, Records
from onnx_lora.errors import InputError, OutputExistsError, StorageError
from onnx_lora.points import Array
from onnx_lora.staging import alone
from tests.adapters.building import PackageBuilder, lora, numbers, peft_folder
from tests.support.json_schema import check_result
from tests.support.numbers import assert_same_bits


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return PackageBuilder(tmp_path / "package").point("m.q", 4, 6).point("m.v", 4, 6).open()


def _several() -> dict[str, Array]:
    """The tensors of two adapters in one file."""
    tensors: dict[str, Array] = {}
    for seed, name in enumerate(("code", "text")):
        tensors[f"base_model.model.m.q.lora_A.{name}.weight"] = numbers(2, 4, seed=seed)
        tensors[f"base_model.model.m.q.lora_B.{name}.weight"] = numbers(6, 2, seed=seed + 9)
    return tensors


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    peft_folder(folder / "one", lora("m.q", 4, 6))
    peft_folder(folder / "two", lora("m.v", 4, 6, seed=5), target_modules=["v"])
    peft_folder(folder / "jina", _several())
    (folder / "README.md").write_text("two adapters")
    (folder / ".cache").mkdir()
    return folder


def states(done: ConvertedFolder) -> dict[str, str]:
    return {one.name: one.state for one in done.adapters}


def entry(done: ConvertedFolder, name: str) -> Converted:
    (found,) = (one for one in done.adapters if one.name == name)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


ALL = {"jina-code": "written", "jina-text": "written", "one": "written", "two": "written"}


# --- what is converted -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["safetensors", "onnx_adapter", "peft"])
def test_every_adapter_is_written_once_and_the_same(
    adapters: Path, package: Package, tmp_path: Path, format: str
) -> None:
    if format == "onnx_adapter":
        pytest.importorskip("onnxruntime")
    first = convert_all(adapters, tmp_path / "out", format=format, package=package)
    assert states(first) == ALL
    before = contents(tmp_path / "out")
    again = convert_all(adapters, tmp_path / "out", format=format, package=package)
    assert set(states(again).values()) == {"up to date"}
    assert contents(tmp_path / "out") == before
    convert_all(adapters, tmp_path / "elsewhere", format=format, package=package)
    assert contents(tmp_path / "elsewhere") == before
    code = bind(read_adapter(adapters / "jina", name="code"), package).tensors
    for name, values in bind(read_adapter(entry(again, "jina-code").out), package).tensors.items():
        assert_same_bits(values, code[name])


def test_what_is_said_of_an_adapter_is_the_same_of_a_run_that_wrote_nothing(
    adapters: Path, package: Package, tmp_path: Path
) -> None:
    peft_folder(adapters / "one", lora("m.q", 4, 6), lora_alpha=3, base_model_name_or_path="another/base")
    first, again = (convert_all(adapters, tmp_path / "out", format="peft", package=package) for _ in range(2))
    for now, later in zip(first.adapters, again.adapters, strict=True):
        for part in ("notes", "sha256", "size_bytes", "effect", "chosen"):
            assert getattr(now, part) == getattr(later, part)
    effect = entry(again, "one").effect
    assert effect is not None
    assert (effect.applied, effect.at_base) == (("m.q",), ("m.v",))


def test_adapters_are_found_at_any_depth_and_called_after_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    peft_folder(folder / "team" / "a" / "sql")
    own = peft_folder(folder / "several")
    peft_folder(own / "polite")
    peft_folder(own / "checkpoint-100")  # an older state of the same
    peft_folder(folder / "jina", _several())
    file = folder / "v1.5.safetensors"
    file.write_bytes((own / "adapter_model.safetensors").read_bytes())
    collection = find_adapters(folder)
    assert [(one.inside, one.name, one.stem) for one in collection.found] == [
        ("jina", "code", "jina-code"),
        ("jina", "text", "jina-text"),
        ("several", None, "several"),
        ("several", "polite", "several-polite"),
        ("team/a/sql", None, "team/a/sql"),
        ("v1.5.safetensors", None, "v1.5"),
    ]


def test_a_folder_that_is_an_adapter_itself_is_converted(package: Package, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "sql", lora("m.q", 4, 6))
    assert states(convert_all(folder, tmp_path / "out", format="safetensors", package=package)) == {"sql": "written"}


def test_what_is_no_adapter_is_passed_over_and_listed(package: Package, adapters: Path) -> None:
    (adapters / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (adapters / "model" / name).write_bytes(b"{}")
    (adapters / "base").symlink_to(package.path)
    (adapters / "loop").mkdir()
    (adapters / "loop" / "back").symlink_to(adapters)
    collection = find_adapters(adapters)
    assert {one.stem for one in collection.found} == set(ALL)
    assert collection.passed_over == {
        "README.md": "another file",
        "base": "a package of onnx-lora",
        "loop/back": "a link to a folder above it",
        "model": "a checkpoint",
    }


# --- what is made again ------------------------------------------------------------------------


def test_what_changed_is_written_again_and_nothing_else(adapters: Path, package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_all(adapters, out, format="safetensors", package=package)
    config = adapters / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"lora_alpha": 16}), "utf-8")
    (out / "two.safetensors").write_bytes(b"cut")
    done = states(convert_all(adapters, out, format="safetensors", package=package))
    assert done == ALL | {"jina-code": "up to date", "jina-text": "up to date"}
    other = PackageBuilder(tmp_path / "other").point("m.q", 4, 6).point("m.v", 4, 6).point("m.o", 4, 4).open()
    assert states(convert_all(adapters, out, format="safetensors", package=other)) == ALL


def test_a_file_that_was_only_touched_is_up_to_date(adapters: Path, package: Package, tmp_path: Path) -> None:
    convert_all(adapters, tmp_path / "out", format="safetensors", package=package)
    for file in adapters.rglob("*.json"):
        os.utime(file, (1, 1))
    again = convert_all(adapters, tmp_path / "out", format="safetensors", package=package)
    assert set(states(again).values()) == {"up to date"}


def test_what_was_accepted_is_not_up_to_date_where_it_is_refused_now(adapters: Path, tmp_path: Path) -> None:
    builder = PackageBuilder(tmp_path / "package").point("m.q", 4, 6).point("m.v", 4, 6)
    builder.source = {"base": "org/llama-3-8b"}
    package = builder.open()
    for name in ("one", "two", "jina"):
        config = adapters / name / "adapter_config.json"
        config.write_text(config.read_text("utf-8").replace('"tiny"', '"org/mistral-7b"'), "utf-8")
    done = convert_all(adapters, tmp_path / "out", format="safetensors", package=package)
    assert states(done) == ALL
    assert all("org/mistral-7b" in " ".join(one.notes) for one in done.adapters)
    strict = convert_all(adapters, tmp_path / "out", format="safetensors", package=package, strict=True)
    assert set(states(strict).values()) == {"failed"}
    assert all(one.keeps_older for one in strict.adapters)


def test_a_stopped_run_goes_on(
    adapters: Path, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(made: Path, target: Path, aside: Path) -> None:
        if target.name.startswith("one"):
            raise KeyboardInterrupt
        made.replace(target)

    monkeypatch.setattr(convert, "put_over", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_all(adapters, out, format="safetensors", package=package)
    monkeypatch.undo()
    # The record of "one" is there, and its output is not; then the adapter changes, too.
    assert Records(out).has("one.safetensors")
    peft_folder(adapters / "one", lora("m.q", 4, 6, seed=8))
    done = convert_all(adapters, out, format="safetensors", package=package)
    assert states(done) == ALL | {"jina-code": "up to date", "jina-text": "up to date"}
    assert sorted(entry.name for entry in out.iterdir()) == [FOLDER, *sorted(f"{name}.safetensors" for name in ALL)]


# Kills itself before the second output takes its place: of a folder's two steps between them.
KILLED = """
import os, signal, sys
from pathlib import Path
from onnx_lora import Package, convert_all
from onnx_lora.adapters.batch import convert
real = convert.put_over
def kill(made, target, aside):
    if target.name == "one":
        if target.exists():
            target.rename(aside)
        os.kill(os.getpid(), signal.SIGKILL)
    real(made, target, aside)
convert.put_over = kill
adapters, out, package = sys.argv[1:]
convert_all(adapters, out, format="peft", package=package)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "replaced"])
def test_what_a_killed_run_left_is_taken_away_and_it_goes_on(
    adapters: Path, package: Package, tmp_path: Path, is_there: bool
) -> None:
    out = tmp_path / "out"
    if is_there:
        convert_all(adapters, out, format="peft", package=package)
        peft_folder(adapters / "one", lora("m.q", 4, 6, seed=8))
    killed = subprocess.run([sys.executable, "-c", KILLED, adapters, out, package.path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "one").exists()
    assert states(convert_all(adapters, out, format="peft", package=package))["one"] == "written"
    assert sorted(entry.name for entry in out.iterdir()) == [FOLDER, *sorted(ALL)]
    convert_all(adapters, tmp_path / "elsewhere", format="peft", package=package)
    assert contents(out) == contents(tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["", "[]", '{"made_of": 1}', "{"])
def test_a_damaged_record_is_made_again(adapters: Path, package: Package, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    convert_all(adapters, out, format="safetensors", package=package)
    (out / FOLDER / "one.safetensors.json").write_text(text)
    assert states(convert_all(adapters, out, format="safetensors", package=package))["one"] == "written"
    assert isinstance(Records(out).read("one.safetensors"), Record)


def test_outputs_whose_records_are_lost_are_taken_back(adapters: Path, package: Package, tmp_path: Path) -> None:
    """Some stores of CI leave out folders whose names begin with a dot."""
    out = tmp_path / "out"
    convert_all(adapters, out, format="safetensors", package=package)
    for file in (out / FOLDER).rglob("*.json"):
        file.unlink()
    assert states(convert_all(adapters, out, format="safetensors", package=package)) == ALL


def test_the_output_of_an_adapter_that_is_gone_is_told(adapters: Path, package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_all(adapters, out, format="safetensors", package=package)
    (adapters / "two").rename(tmp_path / "two")
    done = convert_all(adapters, out, format="safetensors", package=package)
    assert done.left_over == [out / "two.safetensors"]


# --- what fails --------------------------------------------------------------------------------


def test_one_failure_stops_no_other(adapters: Path, package: Package, tmp_path: Path) -> None:
    peft_folder(adapters / "broken", lora("m.q", 4, 7))
    (adapters / "damaged.safetensors").write_bytes(b"\xff" * 20)
    (adapters / "half").mkdir()
    (adapters / "half" / "adapter_config.json").write_text("{")
    (adapters / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    os.mkfifo(adapters / "pipe.safetensors")
    (adapters / "unknown.bin").write_bytes(bytes(50))
    done = convert_all(adapters, tmp_path / "out", format="safetensors", package=package)
    bad = ("broken", "damaged", "gone", "half", "pipe", "unknown")
    assert states(done) == ALL | dict.fromkeys(bad, "failed")
    assert {one.name for one in done.failed} == set(bad)
    assert "m.q" in str(entry(done, "broken").error)
    assert sorted(contents(tmp_path / "out")) == sorted(
        [f"{FOLDER}/lock", *(f"{name}.safetensors" for name in ALL), *(f"{FOLDER}/{n}.safetensors.json" for n in ALL)]
    )


def test_an_older_output_of_an_adapter_that_fails_now_stays_and_is_told(
    adapters: Path, package: Package, tmp_path: Path
) -> None:
    convert_all(adapters, tmp_path / "out", format="safetensors", package=package)
    peft_folder(adapters / "one", lora("m.q", 4, 7))
    one = entry(convert_all(adapters, tmp_path / "out", format="safetensors", package=package), "one")
    assert (one.state, one.keeps_older, one.out.is_file()) == ("failed", True, True)


@pytest.mark.parametrize("format", ["safetensors", "peft"])
def test_two_adapters_of_one_name_are_not_written_over_each_other(
    adapters: Path, package: Package, tmp_path: Path, format: str
) -> None:
    (adapters / "one.safetensors").write_bytes(safetensors.numpy.save({"m.q.lora_A.weight": numbers(2, 4)}))
    peft_folder(adapters / "JINA-code", lora("m.q", 4, 6))  # one name on many disks
    done = convert_all(adapters, tmp_path / "out", format=format, package=package)
    failed = sorted(one.name for one in done.failed)
    assert failed == ["JINA-code", "jina-code", "one", "one"]
    assert f"would be written to one{'.safetensors' if format == 'safetensors' else ''}" in str(done.failed[2].error)
    assert {name for name in contents(tmp_path / "out") if not name.startswith(FOLDER)} == {
        name for name in contents(tmp_path / "out") if name.startswith(("jina-text", "two"))
    }


def test_an_output_is_not_written_into_anothers_folder(package: Package, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    peft_folder(folder / "a" / "b", lora("m.q", 4, 6))
    write_adapter(read_adapter(folder / "a" / "b"), folder / "a.safetensors", format="safetensors", package=package)
    assert not convert_all(folder, tmp_path / "files", format="safetensors", package=package).failed
    nested = convert_all(folder, tmp_path / "folders", format="peft", package=package)
    assert {one.name: str(one.error).rpartition(": ")[2] for one in nested.failed} == {
        "a": "would be written to a, where a/b would go too; rename one of them",
        "a/b": "would be written to a/b, where a.safetensors would go too; rename one of them",
    }


def test_a_name_in_a_file_that_no_file_can_have_is_refused(package: Package, tmp_path: Path) -> None:
    tensors = {key.replace(".code.", ".a/b."): value for key, value in _several().items()}
    peft_folder(tmp_path / "adapters" / "jina", tensors)
    done = convert_all(tmp_path / "adapters", tmp_path / "out", format="safetensors", package=package)
    assert states(done) == {"jina-a/b": "failed", "jina-text": "written"}


def test_somebody_elses_file_stays(adapters: Path, package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "one.safetensors").write_bytes(b"mine")
    done = convert_all(adapters, out, format="safetensors", package=package)
    assert isinstance(entry(done, "one").error, OutputExistsError)
    assert not entry(done, "one").keeps_older
    assert (out / "one.safetensors").read_bytes() == b"mine"


def test_a_full_disk_fails_what_does_not_fit_and_leaves_nothing_of_it(
    adapters: Path, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def full(self: Path, data: Any) -> int:
        if "one" in self.name:
            real(self, data[:10])
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    out = tmp_path / "out"
    done = convert_all(adapters, out, format="safetensors", package=package)
    assert states(done) == ALL | {"one": "failed"}
    error = entry(done, "one").error
    assert isinstance(error, StorageError)
    assert error.path == str(out / "one.safetensors")
    assert "disk is full" in str(error)
    monkeypatch.undo()
    again = states(convert_all(adapters, out, format="safetensors", package=package))
    assert again == dict.fromkeys(ALL, "up to date") | {"one": "written"}


def test_two_runs_into_one_folder_do_not_meet(adapters: Path, package: Package, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="without locks nothing keeps them apart")
    out = tmp_path / "out"
    convert_all(adapters, out, format="safetensors", package=package)
    with (
        alone(out / FOLDER / "lock", "it is tested", path=out),
        pytest.raises(StorageError, match="another run converts adapters into it; wait until it has ended"),
    ):
        convert_all(adapters, out, format="safetensors", package=package)


def test_what_cannot_be_begun_is_refused(adapters: Path, package: Package, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a folder of adapters, and is not there"):
        convert_all(tmp_path / "nowhere", tmp_path / "out", format="peft")
    with pytest.raises(InputError, match="the format must be one of"):
        convert_all(adapters, tmp_path / "out", format="zip")
    with pytest.raises(InputError, match=r"give that package \(`package=...`\)"):
        convert_all(adapters, tmp_path / "out", format="safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a folder for the outputs, and is a file"):
        convert_all(adapters, tmp_path / "file", format="peft")
    for out in (adapters, adapters / "out", tmp_path):
        with pytest.raises(InputError, match="must lie beside the folder of adapters"):
            convert_all(adapters, out, format="peft")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="must hold adapters, and holds none"):
        convert_all(tmp_path / "empty", tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_the_first_adapters_are_not_kept_in_memory(adapters: Path, package: Package, tmp_path: Path) -> None:
    done = convert_all(adapters, tmp_path / "out", format="safetensors", package=package)
    kept = [value for one in done.adapters for value in vars(one).values()]
    assert not any(isinstance(value, np.ndarray) or hasattr(value, "tensors") for value in kept)


# --- the command -------------------------------------------------------------------------------


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnx_lora", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_reports_all_and_ends_as_a_failure_does(adapters: Path, package: Package, tmp_path: Path) -> None:
    peft_folder(adapters / "broken", lora("m.q", 4, 7))
    asked = ["--all", adapters, tmp_path / "out", "--package", package.path, "--format", "safetensors"]
    done = _command(*asked, "--json")
    assert done.returncode == 2, done.stderr
    body = json.loads(done.stdout)
    check_result("convert", body)
    assert (body["written"], body["up_to_date"], body["failed"], body["exit_code"]) == (4, 0, 1, 2)
    (failed,) = (one for one in body["adapters"] if one["state"] == "failed")
    assert failed["error"]["error"] == "BindError"
    assert f"error: {adapters / 'broken'}: " in done.stderr
    (adapters / "broken").rename(tmp_path / "broken")
    again = _command(*asked)
    assert again.returncode == 0, again.stderr
    assert re.search(r"^up to date +4 *$", again.stdout, re.MULTILINE)
    assert "README.md: another file" in again.stdout
