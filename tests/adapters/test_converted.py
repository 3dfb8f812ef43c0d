"""Bound adapters as files: what is written is read back bit for bit, and nothing is overwritten."""

from __future__ import annotations

import builtins
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from onnx_lora import BoundAdapter, OnnxLoraError, Package, bind, read_adapter, write_bound
from onnx_lora.errors import (
    AdapterFileError,
    BindError,
    InputError,
    MissingDependencyError,
    OutputExistsError,
    StorageError,
)
from tests.adapters.building import PackageBuilder, bound, delta, numbers
from tests.support.numbers import assert_same_bits

FORMATS: tuple[Literal["safetensors", "onnx_adapter"], ...] = ("safetensors", "onnx_adapter")


@pytest.fixture
def package(tmp_path: Path) -> Package:
    builder = PackageBuilder(tmp_path / "package").point("q", 4, 6).point("one", 1, 1)
    builder.weight("score.weight", 4, 2, free=True).bias("score.bias", 2, free=True)
    return builder.whole("norm.weight", 4).open()


@pytest.fixture
def sql(package: Package) -> BoundAdapter:
    deltas = {"q": delta(4, 6, scale=0.3), "one": delta(1, 1, rank=1)}
    whole = {"score.weight": numbers(3, 4), "score.bias": numbers(3), "norm.weight": numbers(4)}
    return bound(package, deltas, whole, name="sql", notes=("a note",))


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_binds_to_the_same_bits(tmp_path: Path, package: Package, sql: BoundAdapter, kind: Any) -> None:
    if kind == "onnx_adapter":
        pytest.importorskip("onnxruntime")
    file = tmp_path / "new" / f"sql.{kind}"
    write_bound(sql, file, format=kind)
    again = bind(read_adapter(file), package)
    assert set(again.tensors) == set(sql.tensors)
    for name, tensor in sql.tensors.items():
        assert_same_bits(again.tensors[name], tensor)
    assert again.name == "sql"
    assert again.origin.format == kind
    assert again.coverage.applied == sql.coverage.applied
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_the_metadata_says_where_it_came_from(tmp_path: Path, package: Package, sql: BoundAdapter) -> None:
    file = tmp_path / "x.safetensors"
    write_bound(sql, file)
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert metadata["source"] == "adapter"
    assert metadata["source_sha256"] == "0" * 64
    adapter = read_adapter(file)
    assert (adapter.origin.method, adapter.origin.base_model) == ("LoRA", "tiny")
    assert adapter.base_digests == sql.base_digests
    assert adapter.notes == ("a note",)
    assert read_adapter(file, name="other").name == "other"


def test_a_converted_file_of_another_base_is_refused(tmp_path: Path, package: Package, sql: BoundAdapter) -> None:
    write_bound(sql, tmp_path / "x.safetensors")
    builder = PackageBuilder(tmp_path / "other").point("one", 1, 1).point("q", 4, 6)
    builder.weight("score.weight", 4, 2, free=True).bias("score.bias", 2, free=True).whole("norm.weight", 4)
    with pytest.raises(BindError, match="another base: 2 of 5"):
        bind(read_adapter(tmp_path / "x.safetensors"), builder.open())


def test_an_onnx_adapter_is_told_from_one_of_another_base(tmp_path: Path, package: Package, sql: BoundAdapter) -> None:
    pytest.importorskip("onnxruntime")
    write_bound(sql, tmp_path / "x.onnx_adapter", format="onnx_adapter")
    adapter = read_adapter(tmp_path / "x.onnx_adapter")
    assert bind(adapter, package).tensors.keys() == sql.tensors.keys()
    builder = PackageBuilder(tmp_path / "other").point("one", 1, 1).point("q", 4, 6)
    builder.weight("score.weight", 4, 2, free=True).bias("score.bias", 2, free=True).whole("norm.weight", 4)
    with pytest.raises(BindError, match="stands for its base weights is not this package's"):
        bind(adapter, builder.open())


def test_an_onnx_adapter_of_another_tool_notes_that_its_base_is_unknown(tmp_path: Path, sql: BoundAdapter) -> None:
    pytest.importorskip("onnxruntime")
    write_bound(replace(sql, graphs=()), tmp_path / "x.onnx_adapter", format="onnx_adapter")
    assert "does not say which base" in read_adapter(tmp_path / "x.onnx_adapter").notes[0]


def test_a_converted_file_keeps_the_names_of_both_bases(tmp_path: Path, package: Package) -> None:
    named = replace(package, manifest=replace(package.manifest, source={"base": "meta/Llama-3"}))
    adapter = read_adapter(write_bound(bound(package, {"q": delta(4, 6)}), tmp_path / "x.safetensors"))
    it = bind(replace(adapter, origin=replace(adapter.origin, base_model="meta/Llama-2")), named)
    file = write_bound(it, tmp_path / "y.safetensors")
    with safetensors.safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    assert (metadata["base_model"], metadata["package_base"]) == ("meta/Llama-2", "meta/Llama-3")
    notes = bind(read_adapter(file), named).coverage.notes
    assert [note for note in notes if "'meta/Llama-2'" in note]


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_overwritten(tmp_path: Path, sql: BoundAdapter, kind: Any) -> None:
    if kind == "onnx_adapter":
        pytest.importorskip("onnxruntime")
    file = tmp_path / f"x.{kind}"
    file.write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        write_bound(sql, file, format=kind)
    assert file.read_bytes() == b"mine"


def test_a_link_to_nowhere_is_not_written_through(tmp_path: Path, sql: BoundAdapter) -> None:
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "y")
    with pytest.raises(OutputExistsError):
        write_bound(sql, tmp_path / "x.safetensors")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, sql: BoundAdapter) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OnnxLoraError):
        write_bound(sql, tmp_path / "file" / "x.safetensors")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, sql: BoundAdapter, monkeypatch: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="disk is full"):
        write_bound(sql, tmp_path / "out" / "x.safetensors")
    assert not (tmp_path / "out").exists()  # the folder was made for it, and goes with it


@pytest.mark.parametrize("kind", FORMATS)
def test_the_name_of_a_file_does_not_matter(tmp_path: Path, sql: BoundAdapter, kind: Any) -> None:
    if kind == "onnx_adapter":
        pytest.importorskip("onnxruntime")
    write_bound(sql, tmp_path / "sql.v2", format=kind)
    assert read_adapter(tmp_path / "sql.v2").origin.format == kind


def test_an_unknown_format_is_refused(tmp_path: Path, sql: BoundAdapter) -> None:
    with pytest.raises(InputError, match="must be safetensors or onnx_adapter"):
        write_bound(sql, tmp_path / "x.gguf", format="gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [True, False])
def test_without_onnx_runtime_the_extra_is_named(
    tmp_path: Path, sql: BoundAdapter, monkeypatch: Any, write: bool
) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "x.onnx_adapter"
    if not write:
        write_bound(sql, file, format="onnx_adapter")
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("onnxruntime"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'onnx-lora\[cpu\]'"):
        write_bound(sql, file, format="onnx_adapter") if write else read_adapter(file)


# --- damaged -----------------------------------------------------------------------------------


def test_a_safetensors_file_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors.numpy.save({"q.lora_A.weight": numbers(1, 4, 2)}))
    with pytest.raises(AdapterFileError, match="must be one that onnx-lora wrote"):
        read_adapter(tmp_path / "x.safetensors")


def saved(tmp_path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors.numpy.save(tensors, {"onnx_lora": "1"} | metadata))
    return file


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="upgrade onnx-lora"):
        read_adapter(saved(tmp_path, {}, onnx_lora="2"))


@pytest.mark.parametrize(
    "metadata", [{"coverage": "{"}, {"coverage": '{"notes": 3}'}, {"base_digests": '{"q": 1}'}, {"base_digests": "[]"}]
)
def test_damaged_metadata_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    with pytest.raises(AdapterFileError):
        read_adapter(saved(tmp_path, {}, **metadata))


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="must have both"):
        read_adapter(saved(tmp_path, {"q.lora_A.weight": numbers(1, 4, 2)}))


@pytest.mark.parametrize("shape", [(4, 2), (2, 4, 2)])
def test_factors_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"q.lora_A.weight": numbers(*shape), "q.lora_B.weight": numbers(1, 2, 6)}
    with pytest.raises(AdapterFileError, match="must have shapes"):
        read_adapter(saved(tmp_path, tensors))


def test_damaged_onnx_adapters_are_refused_and_crash_nothing(tmp_path: Path, sql: BoundAdapter) -> None:
    """Cut at many places, and with every byte of the first tables changed."""
    pytest.importorskip("onnxruntime")
    whole = tmp_path / "x.onnx_adapter"
    write_bound(sql, whole, format="onnx_adapter")
    data = whole.read_bytes()
    changed = [data[:at] + bytes([value]) + data[at + 1 :] for at in range(200) for value in (0, 255)]
    for content in (*changed, b"\x0c\0\0\0TORT" + np.random.default_rng(0).bytes(300)):
        file = tmp_path / "damaged.onnx_adapter"
        file.write_bytes(content)
        with contextlib.suppress(AdapterFileError):
            read_adapter(file)


@pytest.mark.parametrize("kept", [0, 3, 8, 40, 0.5, 0.9])
def test_cut_onnx_adapters_are_refused(tmp_path: Path, sql: BoundAdapter, kept: float) -> None:
    pytest.importorskip("onnxruntime")
    write_bound(sql, tmp_path / "x.onnx_adapter", format="onnx_adapter")
    data = (tmp_path / "x.onnx_adapter").read_bytes()
    (tmp_path / "cut.onnx_adapter").write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(AdapterFileError):
        read_adapter(tmp_path / "cut.onnx_adapter")
