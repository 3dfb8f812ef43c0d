"""What `torch.save` wrote, as numpy arrays, without torch and without running anything in the file.

Both of torch's layouts are read: the zip archive, and the sequence of pickles before it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnx_lora.adapters.formats.files.pickle_program import STORAGES, Storage, Tensor, read_program
from onnx_lora.adapters.formats.files.reading import Reading, TensorFile, name_problems, widen_bfloat16
from onnx_lora.adapters.formats.files.zip_archive import open_archive
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["read_torch_pickle"]

# torch.serialization: the first two pickles of the layout before zip.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_COUNT_SIZE = 8  # bytes of the number of elements, in front of each storage

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
    """The layout of today: an archive of one folder, with the pickle `data.pkl` and a member for each storage."""
    with open_archive(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise TensorError("an archive of torch.save has exactly one data.pkl")
        [pickle] = pickles
        folder = pickle.removesuffix("data.pkl")
        order = members.get(f"{folder}byteorder")
        if order is not None and archive.read(order).strip() != b"little":
            raise TensorError("it was written on a big-endian machine")
        size = members[pickle].file_size
        if size > _PICKLE_LIMIT:
            raise TensorError(f"its data.pkl has {size} bytes (limit {_PICKLE_LIMIT})")
        program = io.BytesIO(archive.read(pickle))
        state = _check_state(read_program(program), file.size)
        return _read_arrays(state, lambda storage: archive.read(f"{folder}data/{storage.key}"))


def _read_legacy(file: Reading) -> Mapping[str, Array]:
    """The layout before zip: pickles one after the other (a magic number, a version, the system, the state dict, the
    keys of its storages), and the storages behind them."""
    stream = io.BytesIO(file.rest())
    magic = read_program(stream)
    version = read_program(stream)
    system = read_program(stream)
    if not _is_number(magic, _LEGACY_MAGIC) or not _is_number(version, _LEGACY_VERSION):
        raise TensorError("it is a pickle, but not one of torch.save")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise TensorError("it was written on a big-endian machine")
    state = _check_state(read_program(stream), file.size)
    keys = _read_keys(stream)
    storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
    if not storages.keys() <= set(keys):
        raise TensorError("it does not hold the storages that its tensors name")
    data = stream.getbuffer()
    position = stream.tell()
    elements: dict[str, memoryview] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise TensorError(f"it holds a storage {abbreviate(key)} that no tensor names")
        begin = position + _COUNT_SIZE
        end = begin + storage.count * _TYPES[storage.kind].itemsize
        count = int.from_bytes(data[position:begin], "little")
        if end > len(data) or count != storage.count:
            raise ValueError(f"storage {abbreviate(key)} does not have {storage.count} elements")
        elements[key] = data[begin:end]
        position = end
    return _read_arrays(state, lambda storage: elements[storage.key])


def _is_number(value: object, number: int) -> bool:
    """Whether a value out of a pickle is this number. Its type is looked at first: nothing else may be compared."""
    return type(value) is int and value == number


def _read_keys(stream: io.BytesIO) -> list[str]:
    """The keys of the storages, in the order in which those lie behind the pickles."""
    keys = read_program(stream)
    if type(keys) is not list or not all(type(key) in (str, int) for key in keys):
        raise TensorError("it does not list its storages")
    return [str(key) for key in keys]


def _check_state(value: Any, size: int) -> dict[str, Tensor]:
    """The value of a pickle as a state dict of a file of `size` bytes. Raises TensorError: it is none."""
    if type(value) is not dict:
        raise TensorError(f"it holds a {type(value).__name__}, not a dictionary")
    for name, tensor in value.items():
        if type(name) is not str or type(tensor) is not Tensor:
            raise TensorError(f"{abbreviate(name)} is a {type(tensor).__name__}, not a tensor")
    problems = name_problems(value)
    if problems:
        raise TensorError(problems[0])
    used = sum(_size(tensor) for tensor in value.values())
    if used > _MOST_USES * size:
        raise TensorError(f"its tensors have {used} bytes, and the whole file has {size}")
    return value


def _size(tensor: Tensor) -> int:
    """The bytes that a tensor takes, of a storage that is as large as it says."""
    count = min(math.prod(tensor.shape), tensor.storage.count)
    return count * _TYPES[tensor.storage.kind].itemsize


def _read_arrays(state: Mapping[str, Tensor], read: Callable[[Storage], bytes | memoryview]) -> Mapping[str, Array]:
    """The tensors as arrays. `read` gives the bytes of a storage, and is asked once for each; tensors that are the same
    piece of the same storage are one array."""
    storages: dict[str, Storage] = {}
    elements: dict[str, Array] = {}
    arrays: dict[Tensor, Array] = {}
    for name, tensor in state.items():
        storage = tensor.storage
        known = storages.setdefault(storage.key, storage)
        if known != storage:
            raise TensorError(f"storage {abbreviate(known.key)} is described in two ways")
        if storage.key not in elements:
            elements[storage.key] = _read_elements(read(storage), storage)
        if tensor not in arrays:
            arrays[tensor] = _view(name, elements[storage.key], tensor)
    return {name: arrays[tensor] for name, tensor in state.items()}


def _read_elements(data: bytes | memoryview, storage: Storage) -> Array:
    """The elements of a storage, one after the other."""
    values: Array = np.frombuffer(bytes(data), _TYPES[storage.kind])
    if values.size != storage.count:
        raise ValueError(f"storage {abbreviate(storage.key)} has {values.size} elements and must have {storage.count}")
    return widen_bfloat16(values) if storage.kind == "BFloat16Storage" else values


def _view(name: str, values: Array, tensor: Tensor) -> Array:
    """The piece of a storage's elements that a tensor is. Raises TensorError: it lies outside of them."""
    count = math.prod(tensor.shape)
    if count == 0:
        return np.empty(tensor.shape, values.dtype)
    last = tensor.offset
    for size, stride in zip(tensor.shape, tensor.strides, strict=True):
        last += (size - 1) * stride
    if last >= values.size or count > values.size:
        raise TensorError(f"{name} reaches beyond its storage of {values.size} elements")
    return np.lib.stride_tricks.as_strided(
        values[tensor.offset :],
        tensor.shape,
        [stride * values.itemsize for stride in tensor.strides],
        writeable=False,
    )
