"""Small ONNX graphs written by hand, in the forms that exporters give to linear modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["lora", "random", "save"]

Weights = Mapping[str, np.ndarray[Any, Any]]


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Weights,
    *,
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str | None]],
    opset: int = 18,
    external: bool = False,
) -> Path:
    """Write a float graph to `path`; int64 inputs are those called `ids`."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else TensorProto.FLOAT, list(shape))
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def lora(
    module: str, inputs: int, outputs: int, *, rank: int = 2, rows: int = 1, seed: int = 5
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Random tensors of one point, by graph input name."""
    return {
        f"{module}.lora_A.weight": random(rows, inputs, rank, seed=seed),
        f"{module}.lora_B.weight": random(rows, rank, outputs, seed=seed + 1),
    }
