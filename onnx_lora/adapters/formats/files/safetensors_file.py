"""A safetensors file as numpy arrays: bfloat16 becomes float32, all other types stay. It trusts
nothing in the file, and knows nothing of what its tensors mean.

The safetensors library's own parser is not used. `safetensors.safe_open` opens the file a second time, when it may be
another one. `safetensors.deserialize` takes the bytes that were read, and gives no metadata, so that the header would
be parsed twice (2 s more for 130,000 tensors). It copies every tensor (513 MB for a file of 256 MB, in place of 257).
And it takes names that no terminal can show, names that come twice, more axes than numpy has, empty tensors of 2^61
rows, and types that numpy lacks. A test holds that whatever it refuses is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lora.adapters.formats.files.reading import Reading, TensorFile, name_problems, parse_json, widen_bfloat16
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["Header", "read_behind", "read_header", "read_safetensors"]

# A pair for each of 384 experts in 60 layers has 25 MB. The safetensors library itself stops at 100.
_HEADER_LIMIT = 64 * 2**20  # bytes

_MOST_AXES = 32  # as many as numpy has in every version
_LARGEST_SIZE = 2**62

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
class _Entry:
    name: str
    kind: str  # a key of _DTYPES
    shape: tuple[int, ...]
    start: int  # bytes, in the data
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself; its tensors come behind it."""

    entries: Sequence[_Entry]
    metadata: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]


def read_safetensors(file: Reading) -> TensorFile:
    """Read all tensors and the metadata.

    Raises AdapterFileError: cut off, damaged, or with a type of tensor not known here.
    """
    return read_behind(file, read_header(file))


def read_header(file: Reading) -> Header:
    """What stands before the tensors. Raises AdapterFileError, as `read_safetensors`."""
    length = int.from_bytes(file.ahead(8), "little")
    if file.size < 8 or length > file.size - 8 or length > _HEADER_LIMIT:
        raise AdapterFileError(
            f"must begin with the length of its header (at most {_HEADER_LIMIT}), and has {file.size} bytes where the "
            f"header alone needs {8 + length}: it was cut off, or is no safetensors file",
            path=file.path,
        )
    file.take(8)
    text = file.take(length)
    if not text.startswith(b"{"):
        raise AdapterFileError("the header must be a JSON object; this is no safetensors file", path=file.path)
    header = parse_json(text, file.path, what="the header", names_once=True)
    metadata = header.pop("__metadata__", None) or {}
    entries, problems = _read_entries(header, file.left)
    are_texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not are_texts:
        problems.append("__metadata__ must map names to strings")
    if problems:
        raise AdapterFileError("is damaged, or no safetensors file; get it again", path=file.path, problems=problems)
    return Header(entries, metadata)


def read_behind(file: Reading, header: Header) -> TensorFile:
    """The tensors behind a header, which lie there in its order and without gaps. Raises AdapterFileError: cut off."""
    tensors: dict[str, Array] = {}
    for entry in header.entries:
        data = file.take(entry.end - entry.start)
        tensors[entry.name] = _tensor(data, entry)
    return TensorFile(tensors, header.metadata, file.sha256())


def _read_entries(header: dict[str, Any], available: int) -> tuple[list[_Entry], list[str]]:
    """The header's entries in file order, and what is wrong with them."""
    entries: list[_Entry] = []
    problems = name_problems(header)
    for name, info in header.items():
        try:
            entries.append(_read_entry(name, info))
        except TensorError as error:
            problems.append(f"{abbreviate(name)}: {error}")
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end = 0
    for entry in entries:
        if entry.start != end and not problems:
            problems.append(f"{entry.name}: begins at byte {entry.start} and must begin at {end}")
        end = entry.end
    if end != available and not problems:
        problems.append(f"the data must have {end} bytes and has {available}: it was cut off, or something was added")
    return entries, problems


def _read_entry(name: str, info: object) -> _Entry:
    """One entry of the header. Raises TensorError: it is damaged, or of a type that is not known here."""
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= set(info):
        raise TensorError("must have dtype, shape and data_offsets")
    kind = info["dtype"]
    shape = info["shape"]
    offsets = info["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise TensorError(f"type {abbreviate(kind)} is not known here; known are {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise TensorError(f"impossible shape {abbreviate(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise TensorError(f"impossible data_offsets {abbreviate(offsets)}")
    start, end = offsets
    size = math.prod(shape) * _DTYPES[kind].itemsize
    if end - start != size:
        raise TensorError(f"shape {shape} of {kind} does not fit {end - start} bytes")
    return _Entry(name, kind, tuple(shape), start, end)


def _are_sizes(value: object) -> bool:
    """Whether it is a list of whole numbers that fit 64 bits as sizes do."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _LARGEST_SIZE for item in value)


def _tensor(data: bytes, entry: _Entry) -> Array:
    values: Array = np.frombuffer(data, _DTYPES[entry.kind]).reshape(entry.shape)
    if entry.kind == "BF16":
        values = widen_bfloat16(values)
    values.flags.writeable = False
    return values
