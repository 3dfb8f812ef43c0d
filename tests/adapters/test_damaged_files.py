"""Damage of every kind that a reader knows, refused by name; what else bytes may do, `tests/fuzz` tries."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora.adapters.formats.files import npz_file, safetensors_file, torch_pickle
from onnx_lora.adapters.formats.files.reading import open_reading
from onnx_lora.errors import AdapterFileError
from tests.adapters.building import lora, numbers

TENSORS = lora("m.q", 4, 6)
SAFETENSORS = safetensors.numpy.save(TENSORS)


def torch_file(*, zipped: bool) -> bytes:
    torch = pytest.importorskip("torch")
    out = io.BytesIO()
    state = {key: torch.from_numpy(value) for key, value in TENSORS.items()}
    torch.save(state, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def read_safetensors(path: Path) -> Any:
    with open_reading(path) as file:
        return safetensors_file.read_safetensors(file)


def read_torch_pickle(path: Path) -> Any:
    with open_reading(path) as file:
        return torch_pickle.read_torch_pickle(file).tensors


def written(tmp_path: Path, data: bytes) -> Path:
    file = tmp_path / "file"
    file.write_bytes(data)
    return file


# --- safetensors -------------------------------------------------------------------------------


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cut off"),
        (b"\x01\0\0", "cut off"),
        (safetensors_bytes(b"{}", length=2**62), "cut off"),
        (safetensors_bytes(b"{}", length=99), "cut off"),
        (safetensors_bytes(b"[]"), "must be a JSON object"),
        (safetensors_bytes(b"{"), "damaged"),
        (safetensors_bytes(b'{"a": ' + b"[" * 100_000), "damaged"),
        (safetensors_bytes({"a": entry()}, b"123"), "must have 4 bytes and has 3"),
        (safetensors_bytes({"a": entry()}, b"12345"), "must have 4 bytes and has 5"),
        (safetensors_bytes({"a": entry(offsets=(4, 8))}, bytes(8)), "must begin at 0"),
        (safetensors_bytes({"a": entry(), "b": entry()}, bytes(4)), "must begin at 4"),
        (safetensors_bytes({"a": entry(shape=[2])}, bytes(4)), "does not fit"),
        (safetensors_bytes({"a": entry(shape=[-1])}, bytes(4)), "impossible shape"),
        (safetensors_bytes({"a": entry(shape=[2**70])}, bytes(4)), "impossible shape"),
        (safetensors_bytes({"a": entry(shape=[True])}, bytes(4)), "impossible shape"),
        (safetensors_bytes({"a": entry(shape=[1] * 40)}, bytes(4)), "impossible shape"),
        (safetensors_bytes({"a": entry(offsets=[0])}, bytes(4)), "impossible data_offsets"),
        (safetensors_bytes({"a": entry(offsets=[4, 0])}, bytes(4)), "does not fit"),
        (safetensors_bytes({"a": entry("F8_E4M3", offsets=(0, 1))}, b"1"), "'F8_E4M3' is not known"),
        (safetensors_bytes(b'{"a":' + json.dumps(entry()).encode() + b',"a":0}', bytes(4)), "'a' comes twice"),
        (safetensors_bytes({"a": 1}), "must have dtype, shape and data_offsets"),
        (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__ must map"),
        (safetensors_bytes({"__metadata__": [1]}), "__metadata__ must map"),
    ],
)
def test_impossible_safetensors_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(AdapterFileError, match=words):
        read_safetensors(written(tmp_path, content))


@pytest.mark.parametrize("shape", [(0, 2**61), (2**61, 0, 2**61)])
def test_an_empty_tensor_of_impossible_size_ends_in_our_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = written(tmp_path, safetensors_bytes({"a": entry(shape=shape, offsets=(0, 0))}))
    with contextlib.suppress(AdapterFileError):
        assert read_safetensors(file).tensors["a"].size == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint8", "bool"])
def test_types_are_kept(tmp_path: Path, dtype: str) -> None:
    values = numbers(2, 3).astype(dtype)
    read = read_safetensors(written(tmp_path, safetensors.numpy.save({"a": values}))).tensors["a"]
    assert read.dtype == values.dtype
    assert np.array_equal(read, values)


def test_reading_gives_what_the_library_gives(tmp_path: Path) -> None:
    values = {"a": numbers(), "b": numbers(0, 3), "c": numbers(2, 3, 4), "d": numbers(5, dtype="float16")}
    read = read_safetensors(written(tmp_path, safetensors.numpy.save(values, {"k": "v"})))
    assert read.metadata == {"k": "v"}
    assert {name: value.shape for name, value in read.tensors.items()} == {n: v.shape for n, v in values.items()}
    assert all(np.array_equal(read.tensors[name], value) for name, value in values.items())


# --- pickles -----------------------------------------------------------------------------------

LEGACY = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})


class Call:
    """Pickles as a call of `function`, as an attacker writes it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def zipped(pickled: bytes, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, getattr, np.load, io.open, pickle.loads, print, Path])
def test_a_pickle_that_calls_anything_is_refused_and_not_run(
    tmp_path: Path, function: Callable[..., Any], legacy: bool
) -> None:
    evil = pickle.dumps({"w": Call(function, "echo > ran")}, protocol=2)
    content = b"".join(pickle.dumps(part, 2) for part in LEGACY) + evil if legacy else zipped(evil)
    before = set(Path.cwd().iterdir())
    with pytest.raises(AdapterFileError, match=r"asks for .*, which no file of tensors needs"):
        read_torch_pickle(written(tmp_path, content))
    assert set(Path.cwd().iterdir()) == before


def test_setting_attributes_of_what_is_allowed_changes_nothing_outside(tmp_path: Path) -> None:
    """GLOBAL _rebuild_tensor_v2, then BUILD with `__defaults__` for its attributes."""
    program = b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(K\x01tst."
    first = b"\x80\x02" + program + b"b."
    with pytest.raises(AdapterFileError):
        read_torch_pickle(written(tmp_path, zipped(first)))
    data = torch_file(zipped=True)
    assert set(read_torch_pickle(written(tmp_path, data))) == set(TENSORS)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cut off"),
        (b"PK\x03\x04", "cut off"),
        (b"\x80\x02}q\x00.", "cut off|not one of torch"),
        (b"not a pickle at all", "cut off"),
        (zipped(pickle.dumps([1])), "holds a list"),
        (zipped(pickle.dumps({"a": 1})), "'a' is a int, not a tensor"),
        (zipped(pickle.dumps({1: 1})), "not a tensor"),
        (zipped(pickle.dumps({}), byteorder=b"big"), "big-endian"),
        (b"".join(pickle.dumps(part, 2) for part in (1, 1001, {})), "not one of torch.save"),
        (b"".join(pickle.dumps(part, 2) for part in (*LEGACY[:2], {"little_endian": False})), "big-endian"),
    ],
)
def test_impossible_pickles_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(AdapterFileError, match=words):
        read_torch_pickle(written(tmp_path, content))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(AdapterFileError, match="compressed"):
        read_torch_pickle(written(tmp_path, out.getvalue()))


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path) -> None:
    """Two names for the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10_000))
        second = copy.copy(archive.getinfo("archive/data/0"))
        second.filename = "archive/data/1"
        archive.filelist.append(second)
        archive.NameToInfo[second.filename] = second
    with pytest.raises(AdapterFileError, match="claims to hold more"):
        read_torch_pickle(written(tmp_path, out.getvalue()))


class _Stored:
    """A tensor as torch pickles it, with any offset, shape and strides."""

    def __init__(self, *fields: Any) -> None:
        self.fields = fields


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, storage: tuple[Any, ...]) -> None:
        super().__init__(file, 2)
        self.storage = storage

    def persistent_id(self, obj: Any) -> Any:
        return self.storage if isinstance(obj, str) and obj == "the storage" else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _Stored):
            torch = pytest.importorskip("torch")
            return torch._utils._rebuild_tensor_v2, ("the storage", *obj.fields, False, {})
        return NotImplemented


def tensor_file(offset: Any, shape: Any, strides: Any, *, count: Any = 6, data: bytes = bytes(24)) -> bytes:
    torch = pytest.importorskip("torch")
    out = io.BytesIO()
    _Pickler(out, ("storage", torch.FloatStorage, "0", "cpu", count)).dump({"w": _Stored(offset, shape, strides)})
    return zipped(out.getvalue(), **{"data/0": data})


@pytest.mark.parametrize(
    "fields, words",
    [
        ((0, (7,), (1,)), "beyond its storage"),
        ((1, (6,), (1,)), "beyond its storage"),
        ((0, (2, 3), (3, 2)), "beyond its storage"),
        ((0, (10**9, 10**9), (0, 0)), "beyond its storage"),
        ((-1, (2,), (1,)), "impossible"),
        ((0, (2,), (-1,)), "impossible"),
        ((0, (2,), (1, 1)), "differ in length"),
        ((0, (2.0,), (1,)), "impossible"),
        ((2**62, (0,), (1,)), "impossible"),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path: Path, fields: tuple[Any, ...], words: str) -> None:
    with pytest.raises(AdapterFileError, match=words):
        read_torch_pickle(written(tmp_path, tensor_file(*fields)))


@pytest.mark.parametrize("count", [5, 7, -1, None, 2**70])
def test_a_storage_of_another_size_is_refused(tmp_path: Path, count: Any) -> None:
    with pytest.raises(AdapterFileError):
        read_torch_pickle(written(tmp_path, tensor_file(0, (2,), (1,), count=count)))


def test_a_tensor_inside_its_storage_is_read(tmp_path: Path) -> None:
    data = np.arange(6, dtype=np.float32)
    file = written(tmp_path, tensor_file(1, (2, 2), (1, 2), data=data.tobytes()))
    assert np.array_equal(read_torch_pickle(file)["w"], [[1, 3], [2, 4]])


# --- what the libraries refuse -----------------------------------------------------------------

NPZ_ARRAYS = {"a": numbers(2, 3), "b": numbers(4).astype("f2"), "c": np.arange(3)}


def npz_bytes() -> bytes:
    out = io.BytesIO()
    np.savez(out, **NPZ_ARRAYS)
    return out.getvalue()


def mutants(data: bytes, count: int, *, within: int) -> Iterator[bytes]:
    """The bytes with one to three of the first `within` changed, or with a part cut out or doubled."""
    random = np.random.default_rng(0)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(random.integers(1, 4)):
            place = int(random.integers(min(within, len(mutant))))
            choice = random.integers(4)
            if choice == 0:
                mutant[place] = int(random.integers(256))
            elif choice == 1:
                mutant[place] = ord('0123456789[]{},:"'[int(random.integers(17))])
            elif choice == 2:
                del mutant[place : place + int(random.integers(1, 9))]
            else:
                mutant[place:place] = mutant[place : place + int(random.integers(1, 9))]
        yield bytes(mutant)


def test_what_the_safetensors_library_refuses_is_refused(tmp_path: Path) -> None:
    refused, values = 0, {"a": numbers(2, 3), "bb": numbers(4).astype("f2"), "c": np.arange(3)}
    for mutant in mutants(safetensors.numpy.save(values, {"k": "v"}), 1500, within=200):
        try:
            expected = safetensors.numpy.load(mutant)
        except Exception:  # noqa: BLE001 - of many kinds, the library's own among them
            refused += 1
            with pytest.raises(AdapterFileError):
                read_safetensors(written(tmp_path, mutant))
            continue
        with contextlib.suppress(AdapterFileError):
            own = read_safetensors(written(tmp_path, mutant)).tensors
            assert own.keys() == expected.keys()
            for name, value in expected.items():
                assert own[name].shape == value.shape
                assert own[name].tobytes() == value.tobytes()
    assert refused > 500


def test_what_numpy_refuses_of_an_npz_is_refused(tmp_path: Path) -> None:
    refused, data = 0, npz_bytes()
    for mutant in mutants(data, 1500, within=len(data)):
        try:
            expected = dict(np.load(io.BytesIO(mutant), allow_pickle=False).items())
        except Exception:  # noqa: BLE001 - as above
            refused += 1
            with pytest.raises(AdapterFileError):
                read_npz_tensors(written(tmp_path, mutant))
            continue
        with contextlib.suppress(AdapterFileError):
            own = read_npz_tensors(written(tmp_path, mutant))
            for name, value in own.items():
                assert value.tobytes() == expected[name].tobytes()
    assert refused > 500


def read_npz_tensors(path: Path) -> Any:
    with open_reading(path) as file:
        return npz_file.read_npz(file).tensors
