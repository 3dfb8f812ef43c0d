"""Tensors and a config that somebody holds in memory, as a file's: copied, named as a file's must be, and of numpy's
types. It knows no format."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import Enum
from hashlib import sha256
from typing import Any, Protocol

import numpy as np

from onnx_lora.adapters.formats.files.reading import TensorFile, name_problems
from onnx_lora.adapters.problems import abbreviate
from onnx_lora.errors import AdapterFileError, first_line
from onnx_lora.points import Array

__all__ = ["MEMORY", "TorchTensor", "as_json", "as_tensor_file"]

# What stands for the path of an adapter that has none.
MEMORY = "memory"


class TorchTensor(Protocol):
    """A tensor of torch, for checkers: this part of the package knows torch only where somebody else imported it."""

    def detach(self) -> Any:
        """The tensor without its gradients."""

    def cpu(self) -> Any:
        """The tensor in the machine's own memory."""


def as_tensor_file(tensors: Mapping[str, Array | TorchTensor]) -> TensorFile:
    """The tensors as a file's: read-only copies. `tensors`: arrays of numpy, or tensors of torch.

    Raises AdapterFileError: what is no dense tensor of numbers, or has no name that a file could have.
    """
    arrays = _arrays(tensors)
    return TensorFile(arrays, {}, _digest(arrays))


def as_json(value: Any) -> Any:
    """A config's value as a JSON file would have it: objects in memory hold sets and enums."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((as_json(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _arrays(tensors: Mapping[str, Array | TorchTensor]) -> dict[str, Array]:
    """As `as_tensor_file`."""
    arrays: dict[str, Array] = {}
    problems: list[str] = []
    for key, value in tensors.items():
        if not isinstance(key, str):
            problems.append(f"{abbreviate(key)}: a name must be text, and is {type(key).__name__}")
            continue
        try:
            arrays[key] = _array(value)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            problems.append(
                f"{key}: must be a dense array of numpy or tensor of torch, and is not: {first_line(error)}"
            )
    problems += name_problems(arrays)
    if problems:
        raise AdapterFileError("its tensors must be named arrays of numbers", path=MEMORY, problems=problems)
    return arrays


def _array(value: Any) -> Array:
    """A copy, read-only; bfloat16, which numpy lacks, becomes float32, as it does from files.

    Raises TypeError, ValueError, RuntimeError: it is no dense array or tensor of numbers.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        value = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"it is a {type(value).__name__}")
    dtype = np.dtype(np.float32) if value.dtype.name == "bfloat16" else value.dtype.newbyteorder("=")
    copied = np.array(value, dtype=dtype, order="C")
    copied.flags.writeable = False
    return copied


def _digest(arrays: Mapping[str, Array]) -> str:
    """The SHA-256 of names, types, shapes and values, whatever the order of the tensors."""
    hashed = sha256()
    for name in sorted(arrays):
        array = arrays[name]
        hashed.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()
