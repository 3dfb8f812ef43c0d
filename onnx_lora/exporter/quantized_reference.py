"""What a quantized package is compared with: its own weights, dequantized, in the torch model. Then nothing but
rounding in float32 may differ, and nothing wrong can hide behind quantization."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.load import load
from onnx_lora.exporter.locate import locate
from onnx_lora.exporter.located import Occurrence
from onnx_lora.package import Package

__all__ = ["adopt_quantized"]

logger = logging.getLogger(__name__)


def adopt_quantized(package: Package, model: Any) -> None:
    """Put every weight that the package quantized, as it is there, into the torch model it was made from."""
    if not package.quantized:
        return
    checkpoint = Checkpoint.of_module(model, heads=heads_of(model))
    for info in package.manifest.graphs:
        graph = load(package.path / info.base_file).graph
        found = locate(graph, checkpoint)
        quantized = [linear for linear in found.linears if linear.product.quantized is not None]
        if not any("BlockQuantized" in node.op_type for node in graph):
            _untie(model, {linear.module for linear in quantized})
        for linear in quantized:
            _adopt(model, linear)


def _untie(model: Any, modules: set[str]) -> None:
    """Give a tied head that alone was quantized a weight of its own: the embedding keeps the float one."""
    import torch

    embedding = model.get_input_embeddings()
    for name in modules:
        module = model.get_submodule(name)
        if module.weight is embedding.weight:
            module.weight = torch.nn.Parameter(module.weight.detach().clone())


def _adopt(model: Any, linear: Occurrence) -> None:
    import torch

    weight = model.get_submodule(linear.module).weight.data
    values = torch.from_numpy(np.ascontiguousarray(linear.window())).to(weight.dtype)
    outputs = slice(linear.first, linear.first + linear.outputs)
    if linear.in_out:
        weight[:, outputs] = values
    else:
        weight[outputs] = values.T
