"""What `torch.save` wrote, as numpy arrays, without torch and without running anything in the file.

A pickle is a program; this one may call the few names that rebuild tensors, and every other name
is refused. Both of torch's layouts are read: the zip archive, and the sequence of pickles before it.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onnx_lora.adapters.formats.files import opened, widened_bfloat16
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["read_torch_pickle"]

# torch.serialization: the first two pickles of the layout before zip.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

# The pickle of a state dict holds names and shapes: about 200 bytes a tensor.
_PICKLE_LIMIT = 64 * 2**20  # bytes

_STORAGES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

# All that unpickling and unzipping damaged bytes was seen to raise.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class _Storage:
    kind: str  # a key of _STORAGES
    key: str
    count: int  # elements


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


class _RefusedError(Exception):
    """A name, a value or a layout that is not allowed; the text says which."""


class _Unpickler(pickle._Unpickler):
    """The pure Python unpickler: its memo is a dict, where the C one allocates what the file asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return name
        # Made anew for every file: a pickle can set attributes of what it is given.
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): lambda sizes: tuple(sizes),
            ("torch._utils", "_rebuild_tensor"): lambda *fields: _rebuild(*fields),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *fields: _rebuild(*fields[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda *fields: fields[0],
        }
        if (module, name) not in allowed:
            raise _RefusedError(f"it asks for {module}.{name}, which no file of tensors needs")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or pid[1] not in _STORAGES:
            raise _RefusedError(f"it names a storage in a way not known here: {str(pid)[:100]}")
        if len(pid) > 5 and pid[5] is not None:
            raise _RefusedError("it uses storages that are views of others (torch before 0.4)")
        if type(pid[4]) is not int or pid[4] < 0:
            raise _RefusedError(f"impossible size {pid[4]!r} of a storage")
        return _Storage(pid[1], str(pid[2]), pid[4])


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        raise _RefusedError("a tensor with an impossible storage, offset, shape or stride")
    if len(shape) != len(strides) or len(shape) > 32:
        raise _RefusedError("a tensor whose shape and strides differ in length")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def read_torch_pickle(path: Path) -> Mapping[str, Array]:
    """Read a state dict: a mapping from names to tensors, and nothing else.

    Raises AdapterFileError: no file, cut off, damaged, or with anything but tensors in it.
    """
    with opened(path) as file:
        start = file.read(4)
        file.seek(0)
        try:
            return _read_zip(file) if start == b"PK\x03\x04" else _read_legacy(file)
        except _RefusedError as error:
            raise AdapterFileError(
                f"must hold tensors by name and nothing else, and was not loaded: {error}; "
                "load it where you trust it and save it again as adapter_model.safetensors",
                path=path,
            ) from None
        except _DAMAGE as error:
            raise AdapterFileError(
                f"is cut off, damaged, or not written by torch.save ({type(error).__name__}: {error}); get it again",
                path=path,
            ) from error


def _read_zip(file: BinaryIO) -> Mapping[str, Array]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _RefusedError("an archive of torch.save has exactly one data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise _RefusedError("its archive is compressed, which torch.save never does")
        size = file.seek(0, io.SEEK_END)
        if sum(info.file_size for info in archive.infolist()) > size:
            raise _RefusedError(f"its archive claims to hold more than the file's {size} bytes")
        order = members.get(f"{root}byteorder")
        if order is not None and archive.read(order).strip() != b"little":
            raise _RefusedError("it was written on a big-endian machine")
        if members[pickles[0]].file_size > _PICKLE_LIMIT:
            raise _RefusedError(f"its data.pkl has {members[pickles[0]].file_size} bytes (limit {_PICKLE_LIMIT})")
        state = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        return _arrays(state, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(file: BinaryIO) -> Mapping[str, Array]:
    stream = io.BytesIO(file.read())
    magic, version, system = (_Unpickler(stream).load() for _ in range(3))
    if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION:
        raise _RefusedError("it is a pickle, but not one of torch.save")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _RefusedError("it was written on a big-endian machine")
    unpickler = _Unpickler(stream)
    state = unpickler.load()
    keys = _Unpickler(stream).load()
    sizes = {tensor.storage.key: tensor.storage for tensor in _tensors(state).values()}
    if not isinstance(keys, list) or not set(sizes) <= set(map(str, keys)):
        raise _RefusedError("it does not hold the storages that its tensors name")
    view = stream.getbuffer()
    where: dict[str, memoryview] = {}
    position = stream.tell()
    for key in map(str, keys):
        storage = sizes.get(key)
        if storage is None:
            raise _RefusedError(f"it holds a storage {key!r} that no tensor names")
        end = position + 8 + storage.count * _STORAGES[storage.kind].itemsize
        if end > len(view) or int.from_bytes(view[position : position + 8], "little") != storage.count:
            raise ValueError(f"storage {key} does not have {storage.count} elements")
        where[key] = view[position + 8 : end]
        position = end
    return _arrays(state, lambda storage: where[storage.key])


def _tensors(state: Any) -> dict[str, _Tensor]:
    if not isinstance(state, dict):
        raise _RefusedError(f"it holds a {type(state).__name__}, not a dictionary")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise _RefusedError(f"{str(name)[:100]!r} is a {type(value).__name__}, not a tensor")
    return state


def _arrays(state: Any, read: Callable[[_Storage], bytes | memoryview]) -> Mapping[str, Array]:
    storages: dict[_Storage, Array] = {}
    arrays: dict[str, Array] = {}
    for name, tensor in _tensors(state).items():
        storage = tensor.storage
        if storage not in storages:
            values: Array = np.frombuffer(read(storage), _STORAGES[storage.kind])
            if values.size != storage.count:
                raise ValueError(f"storage {storage.key} has {values.size} elements and must have {storage.count}")
            storages[storage] = widened_bfloat16(values) if storage.kind == "BFloat16Storage" else values
        arrays[name] = _strided(name, storages[storage], tensor)
    return arrays


def _strided(name: str, values: Array, tensor: _Tensor) -> Array:
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if count and (last >= values.size or count > values.size):
        raise _RefusedError(f"{name} reaches beyond its storage of {values.size} elements")
    if not count:
        return np.empty(tensor.shape, values.dtype)
    return np.lib.stride_tricks.as_strided(
        values[tensor.offset :],
        tensor.shape,
        [stride * values.itemsize for stride in tensor.strides],
        writeable=False,
    )
