"""A safetensors file as numpy arrays: bfloat16 becomes float32, all other types stay. It trusts
nothing in the file, and knows nothing of what its tensors mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onnx_lora.adapters.formats.files import opened, parse_json, widened_bfloat16
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["SafetensorsFile", "read_names", "read_safetensors"]

# The limit of the safetensors library itself.
_HEADER_LIMIT = 100_000_000  # bytes

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class SafetensorsFile:
    tensors: Mapping[str, Array]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class _Entry:
    name: str
    kind: str  # a key of _DTYPES
    shape: tuple[int, ...]
    start: int  # bytes, in the data
    end: int


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read all tensors and the metadata.

    Raises AdapterFileError: no file, cut off, damaged, or with a type of tensor not known here.
    """
    with opened(path) as file:
        entries, metadata, data_start = _contents(file, path)
        tensors = {entry.name: _tensor(file, data_start, entry, path) for entry in entries}
    return SafetensorsFile(tensors, metadata)


def read_names(path: Path) -> tuple[frozenset[str], Mapping[str, str]]:
    """The tensors' names, and the metadata. Raises AdapterFileError, as `read_safetensors`."""
    with opened(path) as file:
        entries, metadata, _ = _contents(file, path)
    return frozenset(entry.name for entry in entries), metadata


def _contents(file: BinaryIO, path: Path) -> tuple[list[_Entry], Mapping[str, str], int]:
    """The entries, the metadata, and where the data begins."""
    size = file.seek(0, 2)
    file.seek(0)
    header, data_start = _header(file, size, path)
    metadata = header.pop("__metadata__", None) or {}
    entries, problems = _entries(header, size - data_start)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("__metadata__ must map names to strings")
    if problems:
        raise AdapterFileError("is damaged, or no safetensors file; get it again", path=path, problems=problems)
    return entries, metadata, data_start


def _header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8 or length > _HEADER_LIMIT:
        raise AdapterFileError(
            f"must begin with the length of its header, and has {size} bytes where the header alone needs "
            f"{8 + length}: it was cut off, or is no safetensors file",
            path=path,
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise AdapterFileError("the header must be a JSON object; this is no safetensors file", path=path)
    return parse_json(text, path, what="the header"), 8 + length


def _entries(header: dict[str, Any], available: int) -> tuple[list[_Entry], list[str]]:
    """The header's entries in file order, and what is wrong with them."""
    entries: list[_Entry] = []
    problems: list[str] = []
    for name, info in header.items():
        entry = _entry(name, info)
        if isinstance(entry, str):
            problems.append(f"{name}: {entry}")
        else:
            entries.append(entry)
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end = 0
    for entry in entries:
        if entry.start != end and not problems:
            problems.append(f"{entry.name}: begins at byte {entry.start} and must begin at {end}")
        end = entry.end
    if end != available and not problems:
        problems.append(f"the data must have {end} bytes and has {available}: it was cut off, or something was added")
    return entries, problems


def _entry(name: str, info: object) -> _Entry | str:
    """One entry, or what is wrong with it."""
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= set(info):
        return "must have dtype, shape and data_offsets"
    kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        return f"type {kind!r} is not known here; known are {', '.join(_DTYPES)}"
    if not _is_sizes(shape) or len(shape) > 32:
        return f"impossible shape {shape!r}"
    if not _is_sizes(offsets) or len(offsets) != 2:
        return f"impossible data_offsets {offsets!r}"
    start, end = offsets
    if end - start != math.prod(shape) * _DTYPES[kind].itemsize:
        return f"shape {shape} of {kind} does not fit {end - start} bytes"
    return _Entry(name, kind, tuple(shape), start, end)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def _tensor(file: BinaryIO, data_start: int, entry: _Entry, path: Path) -> Array:
    # Tensor by tensor, so that only one of them is held twice while bfloat16 is widened.
    file.seek(data_start + entry.start)
    data = file.read(entry.end - entry.start)
    if len(data) != entry.end - entry.start:
        raise AdapterFileError(f"{entry.name} was cut off while it was read; get the file again", path=path)
    values: Array = np.frombuffer(data, _DTYPES[entry.kind]).reshape(entry.shape)
    if entry.kind == "BF16":
        values = widened_bfloat16(values)
    values.flags.writeable = False
    return values
