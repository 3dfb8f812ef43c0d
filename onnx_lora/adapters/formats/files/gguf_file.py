"""A GGUF file's header and tensors as numpy arrays. It trusts nothing in the file, and knows nothing of what its
tensors mean. Format: ggml's `docs/gguf.md`, versions 2 and 3, little-endian."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lora.adapters.formats.files.reading import Reading, name_problems, widen_bfloat16
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.errors import AdapterFileError, MissingDependencyError
from onnx_lora.points import Array

__all__ = ["MAGIC", "GgufFile", "read_gguf_file"]

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, where the file does not say
_LIMIT = 2**20  # bytes of a name or a text: an adapter has none longer
_AXES = 4

# Fields, tensors and members of arrays together. A model's own vocabulary has 300,000 texts; an adapter has none.
_MOST_VALUES = 1_000_000

# Types of values in the header.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# Types of tensors that numpy has: by ggml's number.
_PLAIN: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    28: np.dtype("<f8"),
    24: np.dtype("i1"),
    25: np.dtype("<i2"),
    26: np.dtype("<i4"),
    27: np.dtype("<i8"),
}
_BFLOAT16 = 30


@dataclass(frozen=True)
class GgufFile:
    """`fields`: numbers, texts, and arrays of them as tuples. `tensors`: in numpy's order of axes, dequantized."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Array]
    sha256: str


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int = 0  # bytes


class _Header:
    """Reads the header front to back, and no more values of it than an adapter has."""

    def __init__(self, file: Reading) -> None:
        self.file, self.values = file, 0

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.file.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > _LIMIT:
            raise TensorError(f"a text of {length} bytes is too long")
        return self.file.take(length).decode("utf-8")

    def count(self, number: int, what: str, *, smallest: int) -> int:
        """The number itself, where so many, each of `smallest` bytes at least, can still come."""
        self.values += number
        if number > self.file.left // smallest or self.values > _MOST_VALUES:
            raise TensorError(f"it cannot hold {number} {what}")
        return number

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise TensorError(f"values of type {kind} are not known here")
        inner = self.number("<I")
        length = self.number("<Q")
        if inner not in _SCALARS and inner != _STRING:
            raise TensorError(f"arrays of type {inner} are not known here")
        smallest = 8 if inner == _STRING else struct.calcsize(_SCALARS[inner])
        count = self.count(length, "values in an array", smallest=smallest)
        return tuple(self.value(inner) for _ in range(count))

    def entry(self) -> _Entry:
        name = self.text()
        axes = self.number("<I")
        if axes > _AXES:
            raise TensorError(f"{name}: {axes} axes are too many")
        shape = [self.number("<Q") for _ in range(axes)]
        kind = self.number("<I")
        offset = self.number("<Q")
        return _Entry(name, tuple(reversed(shape)), kind, offset)


def read_gguf_file(file: Reading) -> GgufFile:
    """Raises AdapterFileError: cut off, damaged, or of a version or a type that is not known here.
    MissingDependencyError: quantized tensors, and no `gguf` package."""
    try:
        fields, entries, alignment = _header(_Header(file))
    except (TensorError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"is damaged, or no GGUF file: {error}", path=file.path) from error
    end = file.size - file.left
    start = end + -end % alignment
    tensors: dict[str, Array] = {}
    for entry in _sized(entries, file.size - start, file.path):
        # What lies between tensors means nothing.
        file.take(start + entry.offset - (file.size - file.left))
        tensors[entry.name] = _tensor(file.take(entry.size), entry, file.path)
    return GgufFile(fields, tensors, file.sha256())


def _header(header: _Header) -> tuple[dict[str, Any], list[_Entry], int]:
    """The fields, the tensors, and to how many bytes their places are aligned."""
    if header.file.take(len(MAGIC)) != MAGIC:
        raise TensorError("it must begin with GGUF")
    version = header.number("<I")
    if version not in _VERSIONS:
        raise TensorError(f"version {version} (a number with zeros at its end: big-endian), and known are {_VERSIONS}")
    # The shortest entries that there can be, in bytes.
    tensors = header.count(header.number("<Q"), "tensors", smallest=24)
    count = header.count(header.number("<Q"), "fields", smallest=13)
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = header.text()
        if key in fields:
            raise TensorError(f"{abbreviate(key)} comes twice")
        fields[key] = header.value(header.number("<I"))
    entries = [header.entry() for _ in range(tensors)]
    alignment = fields.get("general.alignment", _ALIGNMENT)
    is_size = type(alignment) is int and 0 < alignment <= _LIMIT
    if not is_size or alignment.bit_count() != 1:
        raise TensorError(f"general.alignment must be a power of two, and is {alignment!r}")
    return fields, entries, alignment


def _sized(entries: list[_Entry], available: int, path: Path) -> list[_Entry]:
    """The entries with their sizes, in file order. Raises AdapterFileError: they do not fit the file, or each other."""
    problems = name_problems(entry.name for entry in entries)
    sized: list[_Entry] = []
    for entry in entries:
        unit = _unit(entry.kind, path)
        if unit is None:
            problems.append(f"{entry.name}: type {entry.kind} is not known here")
            continue
        count, length = unit
        units, rest = divmod(math.prod(entry.shape), count)
        size = units * length
        are_whole_units = rest == 0 and (not entry.shape or entry.shape[-1] % count == 0)
        if are_whole_units and entry.offset + size <= max(available, 0):
            sized.append(replace(entry, size=size))
        else:
            problems.append(f"{entry.name}: shape {entry.shape} at byte {entry.offset} does not fit the file")
    sized.sort(key=lambda entry: entry.offset)
    for before, entry in pairwise(sized):
        if before.offset + before.size > entry.offset:
            problems.append(f"{entry.name}: lies where {before.name} lies")
    if len({entry.name for entry in entries}) < len(entries):
        problems.append("a name comes twice")
    if problems:
        raise AdapterFileError("is damaged; get it again", path=path, problems=problems)
    return sized


def _unit(kind: int, path: Path) -> tuple[int, int] | None:
    """How many numbers lie together in how many bytes; None: an unknown type."""
    if kind in _PLAIN:
        return 1, _PLAIN[kind].itemsize
    if kind == _BFLOAT16:
        return 1, 2
    for known, (count, length) in _gguf(path).GGML_QUANT_SIZES.items():
        if int(known) == kind:
            return int(count), int(length)
    return None


def _gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "quantized GGUF files need the gguf package: `pip install onnx-lora[gguf]`", path=path
        ) from error
    return gguf


def _tensor(data: bytes, entry: _Entry, path: Path) -> Array:
    values: Array
    if entry.kind in _PLAIN:
        values = np.frombuffer(data, _PLAIN[entry.kind])
    elif entry.kind == _BFLOAT16:
        values = widen_bfloat16(np.frombuffer(data, "<u2"))
    else:
        gguf = _gguf(path)
        try:
            quantized = np.frombuffer(data, np.uint8).reshape(*entry.shape[:-1], -1)
            values = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType(entry.kind))
        except (NotImplementedError, ValueError) as error:
            raise AdapterFileError(f"{entry.name}: {error}; write it with type f32 or f16", path=path) from error
    values = values.reshape(entry.shape)
    values.flags.writeable = False
    return values
