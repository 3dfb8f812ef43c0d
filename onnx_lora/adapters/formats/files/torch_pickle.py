"""What `torch.save` wrote, as numpy arrays, without torch and without running anything in the file.

Both of torch's layouts are read: the zip archive, and the sequence of pickles before it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnx_lora.adapters.formats.files.pickle_program import STORAGES, Storage, Tensor, read_program
from onnx_lora.adapters.formats.files.reading import Reading, TensorFile, name_problems, shown, widen_bfloat16
from onnx_lora.adapters.formats.files.zip_archive import open_archive
from onnx_lora.adapters.formats.problem import TensorError
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["read_torch_pickle"]

# torch.serialization: the first two pickles of the layout before zip.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

# The pickle of a state dict holds names and shapes: about 200 bytes a tensor.
_PICKLE_LIMIT = 64 * 2**20  # bytes

# How often a file's bytes may be in its tensors. PEFT writes RandLoRA's bases once, as tensors of every module.
_MOST_USES = 1000

_TYPES: Mapping[str, np.dtype[Any]] = {kind: np.dtype(name) for kind, name in STORAGES.items()}


def read_torch_pickle(file: Reading) -> TensorFile:
    """Read a state dict: a mapping from names to tensors, and nothing else.

    Raises AdapterFileError: cut off, damaged, or with anything but tensors in it. What the standard library raises of
    damaged bytes is translated where the file is opened.
    """
    try:
        arrays = _read_zip(file) if file.ahead(4) == b"PK\x03\x04" else _read_legacy(file)
    except TensorError as error:
        raise AdapterFileError(
            f"must hold tensors by name and nothing else, and was not loaded: {error}; "
            "load it where you trust it and save it again as adapter_model.safetensors",
            path=file.path,
        ) from None
    return TensorFile(arrays, {}, file.sha256())


def _read_zip(file: Reading) -> Mapping[str, Array]:
    with open_archive(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise TensorError("an archive of torch.save has exactly one data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and archive.read(order).strip() != b"little":
            raise TensorError("it was written on a big-endian machine")
        if members[pickles[0]].file_size > _PICKLE_LIMIT:
            raise TensorError(f"its data.pkl has {members[pickles[0]].file_size} bytes (limit {_PICKLE_LIMIT})")
        state = _state(read_program(io.BytesIO(archive.read(pickles[0]))), file.size)
        return _arrays(state, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(file: Reading) -> Mapping[str, Array]:
    stream = io.BytesIO(file.rest())
    magic, version, system = (read_program(stream) for _ in range(3))
    if type(magic) is not int or magic != _LEGACY_MAGIC or type(version) is not int or version != _LEGACY_VERSION:
        raise TensorError("it is a pickle, but not one of torch.save")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise TensorError("it was written on a big-endian machine")
    state = _state(read_program(stream), file.size)
    keys = read_program(stream)
    storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
    if type(keys) is not list or not all(type(key) in (str, int) for key in keys):
        raise TensorError("it does not list its storages")
    if not set(storages) <= {str(key) for key in keys}:
        raise TensorError("it does not hold the storages that its tensors name")
    view = stream.getbuffer()
    where: dict[str, memoryview] = {}
    position = stream.tell()
    for key in map(str, keys):
        storage = storages.get(key)
        if storage is None:
            raise TensorError(f"it holds a storage {shown(key)} that no tensor names")
        end = position + 8 + storage.count * _TYPES[storage.kind].itemsize
        if end > len(view) or int.from_bytes(view[position : position + 8], "little") != storage.count:
            raise ValueError(f"storage {shown(key)} does not have {storage.count} elements")
        where[key] = view[position + 8 : end]
        position = end
    return _arrays(state, lambda storage: where[storage.key])


def _state(value: Any, size: int) -> dict[str, Tensor]:
    """A state dict, of a file of `size` bytes."""
    if type(value) is not dict:
        raise TensorError(f"it holds a {type(value).__name__}, not a dictionary")
    for name, tensor in value.items():
        if type(name) is not str or type(tensor) is not Tensor:
            raise TensorError(f"{shown(name)} is a {type(tensor).__name__}, not a tensor")
    if problems := name_problems(value):
        raise TensorError(problems[0])
    used = sum(_bytes(tensor) for tensor in value.values())
    if used > _MOST_USES * size:
        raise TensorError(f"its tensors have {used} bytes, and the whole file has {size}")
    return value


def _bytes(tensor: Tensor) -> int:
    """What a tensor takes, of a storage that is as large as it says."""
    return min(math.prod(tensor.shape), tensor.storage.count) * _TYPES[tensor.storage.kind].itemsize


def _arrays(state: Mapping[str, Tensor], read: Callable[[Storage], bytes | memoryview]) -> Mapping[str, Array]:
    storages: dict[str, tuple[Storage, Array]] = {}
    arrays: dict[Tensor, Array] = {}
    for name, tensor in state.items():
        known, values = storages.get(tensor.storage.key) or (tensor.storage, _numbers(read(tensor.storage), tensor))
        if known != tensor.storage:
            raise TensorError(f"storage {shown(known.key)} is described in two ways")
        storages[known.key] = known, values
        if tensor not in arrays:
            arrays[tensor] = _strided(name, values, tensor)
    return {name: arrays[tensor] for name, tensor in state.items()}


def _numbers(data: bytes | memoryview, tensor: Tensor) -> Array:
    """A storage's elements."""
    storage = tensor.storage
    values: Array = np.frombuffer(bytes(data), _TYPES[storage.kind])
    if values.size != storage.count:
        raise ValueError(f"storage {shown(storage.key)} has {values.size} elements and must have {storage.count}")
    return widen_bfloat16(values) if storage.kind == "BFloat16Storage" else values


def _strided(name: str, values: Array, tensor: Tensor) -> Array:
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if count and (last >= values.size or count > values.size):
        raise TensorError(f"{name} reaches beyond its storage of {values.size} elements")
    if not count:
        return np.empty(tensor.shape, values.dtype)
    return np.lib.stride_tricks.as_strided(
        values[tensor.offset :],
        tensor.shape,
        [stride * values.itemsize for stride in tensor.strides],
        writeable=False,
    )
