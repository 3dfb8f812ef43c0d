"""The weights of a folder of safetensors, as `save_pretrained` writes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from onnx_lora.errors import ModelError
from onnx_lora.exporter.graph_kinds.graph_kind import graph_kinds
from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeight, CheckpointWeights
from onnx_lora.exporter.weights.never_called import is_never_called
from onnx_lora.json_file import read_json
from onnx_lora.points import Array, Bias

__all__ = ["read_folder_weights"]

_INDEX = "model.safetensors.index.json"

# An index of shards has 100 bytes for each tensor: this is one of 600,000.
_INDEX_LIMIT = 64 * 2**20  # bytes


def read_folder_weights(folder: Path) -> CheckpointWeights:
    """The weights of a folder with `model.safetensors`, or its shards and their index.

    Raises ModelError: there are none, or they are damaged.
    """
    # Kept open: opening reads the header, which names every tensor.
    opened: dict[str, Any] = {}
    shapes: dict[str, list[int]] = {}
    for path in _find_files(folder):
        try:
            file: Any = safe_open(str(path), framework="numpy")
            for key in file.keys():  # noqa: SIM118 - not a mapping
                opened[key] = file
                shapes[key] = file.get_slice(key).get_shape()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"must be a safetensors file: {error}", path=path) from error
    weights: list[CheckpointWeight] = []
    vectors: dict[str, Callable[[], Array]] = {}
    for key, shape in shapes.items():
        if len(shape) == 1:
            vectors[key] = partial(_read_vector, opened[key], key)
        module = key.removesuffix(".weight")
        is_weight = module != key and len(shape) > 1
        if not is_weight or is_never_called(module, shapes):
            continue
        # A file says of two axes neither that they are a linear module's nor that they are a table's.
        kinds = tuple(kind for kind in graph_kinds() if kind.has_kernel or len(shape) == 2)
        bias: Bias = "added" if f"{module}.bias" in shapes else "none"
        matrix = shape[0], math.prod(shape[1:])
        read = partial(_read, opened[key], key)
        weights.append(CheckpointWeight(module, matrix, read, kinds, bias))
    modules = frozenset(weight.module for weight in weights)
    return CheckpointWeights(tuple(weights), modules, names=frozenset(shapes), vectors=vectors)


def _find_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        return _find_shards(index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError("a checkpoint must be a folder with .safetensors weights", path=folder)
    return files


def _find_shards(index: Path) -> list[Path]:
    folder = index.parent
    content = read_json(index, ModelError, what="an index of safetensors shards", limit=_INDEX_LIMIT)
    shards = content.get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError("must be an index of safetensors shards, with a weight_map", path=index)
    names = {str(shard) for shard in shards.values()}
    files = [folder / Path(name).name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"the checkpoint lacks {', '.join(missing)}", path=folder)
    return files


def _read(file: Any, key: str, part: tuple[slice, slice]) -> Array:
    """A part of a tensor as a matrix; bfloat16 as float32, which holds each of its values exactly."""
    rows, columns = part
    read: Array = file.get_slice(key)[rows]
    return _without_bfloat16(read.reshape(len(read), -1)[:, columns])


def _read_vector(file: Any, key: str) -> Array:
    return _without_bfloat16(file.get_tensor(key))


def _without_bfloat16(values: Array) -> Array:
    if values.dtype == ml_dtypes.bfloat16:
        return values.astype(np.float32)
    return values
