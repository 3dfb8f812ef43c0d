"""Many adapters converted in one run: resumable, one failure stops no other, the same bytes every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import Package, bind, convert_all, read_adapter
from onnx_lora.adapters import batch
from onnx_lora.errors import InputError, StorageError
from tests.adapters.building import PackageBuilder, lora, numbers, peft_folder
from tests.support.json_schema import check_result
from tests.support.numbers import assert_same_bits


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return PackageBuilder(tmp_path / "package").point("m.q", 4, 6).point("m.v", 4, 6).open()


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    peft_folder(folder / "one", lora("m.q", 4, 6))
    peft_folder(folder / "two", lora("m.v", 4, 6, seed=5), target_modules=["v"])
    several: dict[str, np.ndarray] = {}
    for seed, name in enumerate(("code", "text")):
        several[f"base_model.model.m.q.lora_A.{name}.weight"] = numbers(2, 4, seed=seed)
        several[f"base_model.model.m.q.lora_B.{name}.weight"] = numbers(6, 2, seed=seed + 9)
    peft_folder(folder / "jina", several)
    (folder / "README.md").write_text("two adapters")
    (folder / ".cache").mkdir()
    return folder


def states(done: list[batch.Converted]) -> dict[str, str]:
    return {one.name: one.state for one in done}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


ALL = {"jina-code": "written", "jina-text": "written", "one": "written", "two": "written"}


@pytest.mark.parametrize("format", ["safetensors", "onnx_adapter", "peft"])
def test_every_adapter_is_written_once_and_the_same(
    adapters: Path, package: Package, tmp_path: Path, format: str
) -> None:
    if format == "onnx_adapter":
        pytest.importorskip("onnxruntime")
    assert states(convert_all(adapters, tmp_path / "out", format=format, package=package)) == ALL
    before = contents(tmp_path / "out")
    again = convert_all(adapters, tmp_path / "out", format=format, package=package)
    assert set(states(again).values()) == {"up to date"}
    assert contents(tmp_path / "out") == before
    convert_all(adapters, tmp_path / "elsewhere", format=format, package=package)
    assert contents(tmp_path / "elsewhere") == before
    code = bind(read_adapter(adapters / "jina", name="code"), package).tensors
    (written,) = (one for one in again if one.name == "jina-code")
    for name, values in bind(read_adapter(written.out), package).tensors.items():
        assert_same_bits(values, code[name])


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


def test_one_failure_stops_no_other(adapters: Path, package: Package, tmp_path: Path) -> None:
    peft_folder(adapters / "broken", lora("m.q", 4, 7))
    (adapters / "damaged.safetensors").write_bytes(b"\xff" * 20)
    (adapters / "nothing").mkdir()
    (adapters / "nothing" / "notes.txt").write_text("")
    done = convert_all(adapters, tmp_path / "out", format="safetensors", package=package)
    assert states(done) == ALL | {"broken": "failed", "damaged": "failed", "nothing": "failed"}
    errors = {one.name: str(one.error) for one in done if one.error is not None}
    assert "m.q" in errors["broken"]
    assert not (tmp_path / "out" / "broken.safetensors").exists()


def test_two_adapters_of_one_name_are_not_written_over_each_other(
    adapters: Path, package: Package, tmp_path: Path
) -> None:
    file = adapters / "one.safetensors"
    file.write_bytes(safetensors.numpy.save({"m.q.lora_A.weight": numbers(2, 4)}))
    peft_folder(adapters / "jina-code", lora("m.q", 4, 6))  # read before "jina" is
    done = convert_all(adapters, tmp_path / "out", format="safetensors", package=package)
    assert sum(one.state == "failed" for one in done if one.name == "one") == 2
    assert sorted(one.state for one in done if one.name == "jina-code") == ["failed", "written"]


def test_somebody_elses_file_stays(adapters: Path, package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "one.safetensors").write_bytes(b"mine")
    done = convert_all(adapters, out, format="safetensors", package=package)
    assert states(done)["one"] == "failed"
    assert (out / "one.safetensors").read_bytes() == b"mine"


def test_a_stopped_run_goes_on(
    adapters: Path, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = batch._Batch._write_record

    def stop(self: batch._Batch, target: Path, record: batch._Record) -> None:
        if target.name.startswith("one"):
            raise KeyboardInterrupt
        real(self, target, record)

    monkeypatch.setattr(batch._Batch, "_write_record", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_all(adapters, out, format="safetensors", package=package)
    monkeypatch.undo()
    # "one" was in its place, and not noted.
    assert states(convert_all(adapters, out, format="safetensors", package=package)) == {
        "jina-code": "up to date",
        "jina-text": "up to date",
        "one": "written",
        "two": "written",
    }
    assert sorted(entry.name for entry in out.iterdir()) == [
        ".converted",
        *sorted(f"{name}.safetensors" for name in ALL),
    ]


def test_a_damaged_record_is_made_again(adapters: Path, package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_all(adapters, out, format="safetensors", package=package)
    for text in ("", "[]", '{"source": 1}', "{"):
        (out / ".converted" / "one.safetensors.json").write_text(text)
        assert states(convert_all(adapters, out, format="safetensors", package=package))["one"] == "written"


def test_what_cannot_be_begun_is_refused(adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a folder of adapters"):
        convert_all(tmp_path / "nowhere", tmp_path / "out", format="peft")
    with pytest.raises(InputError, match="the format must be one of"):
        convert_all(adapters, tmp_path / "out", format="zip")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        convert_all(adapters, tmp_path / "file", format="peft")


def test_the_command_reports_all_and_ends_as_a_failure_does(adapters: Path, package: Package, tmp_path: Path) -> None:
    peft_folder(adapters / "broken", lora("m.q", 4, 7))
    command = [sys.executable, "-m", "onnx_lora", "convert", "--all", str(adapters), str(tmp_path / "out"), "--json"]
    command += ["--package", str(package.path), "--format", "safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    body = json.loads(done.stdout)
    check_result("convert", body)
    assert (body["written"], body["up_to_date"], body["failed"]) == (4, 0, 1)
    failed = next(entry for entry in body["adapters"] if entry["state"] == "failed")
    assert failed["error"]["error"] == "BindError"
