"""What a quantised package is compared with: its own weights, dequantised, in the torch model, and its graph in
float arithmetic. What is left to differ is rounding in float32, so nothing wrong can hide behind quantisation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.load import load
from onnx_lora.exporter.locate import locate
from onnx_lora.exporter.located import Linear
from onnx_lora.package import Package

__all__ = ["adopt_quantised", "in_floats"]

logger = logging.getLogger(__name__)

_FLOAT32 = 1  # of MatMulNBits' accuracy levels


def adopt_quantised(package: Package, model: Any) -> None:
    """Put every weight that the package quantised, as it is there, into the torch model it was made from."""
    if not package.quantised:
        return
    checkpoint = Checkpoint.of_module(model, heads=heads_of(model))
    for info in package.manifest.graphs:
        graph = load(package.path / info.base_file).graph
        found = locate(graph, checkpoint)
        quantised = [linear for linear in found.linears if linear.product.quantised is not None]
        if not any("BlockQuantized" in node.op_type for node in graph):
            _untie(model, {linear.module for linear in quantised})
        for linear in quantised:
            _adopt(model, linear)


def in_floats(file: Path) -> bytes | None:
    """The graph of `file` with products of quantised weights in float32, where they are not: multiplied in int8,
    activations are rounded too, and a hundredth of an output is lost. None: it has no such products."""
    model = onnx.load(file, load_external_data=False)
    levels = [
        attribute
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level" and attribute.i != _FLOAT32
    ]
    for level in levels:
        level.i = _FLOAT32
    return model.SerializeToString() if levels else None


def _untie(model: Any, modules: set[str]) -> None:
    """Give a tied head that alone was quantised a weight of its own: the embedding keeps the float one."""
    import torch

    embedding = model.get_input_embeddings()
    for name in modules:
        module = model.get_submodule(name)
        if module.weight is embedding.weight:
            module.weight = torch.nn.Parameter(module.weight.detach().clone())


def _adopt(model: Any, linear: Linear) -> None:
    import torch

    weight = model.get_submodule(linear.module).weight.data
    values = torch.from_numpy(np.ascontiguousarray(linear.window())).to(weight.dtype)
    outputs = slice(linear.first, linear.first + linear.outputs)
    if linear.in_out:
        weight[:, outputs] = values
    else:
        weight[outputs] = values.T
