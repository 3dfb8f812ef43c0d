"""What a quantized package is compared with: its own weights, dequantized, in the torch model.

Its graph then multiplies in float arithmetic (`float_products`), and what is left to differ is rounding in float32:
nothing wrong can hide behind quantization."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.intake.load import load
from onnx_lora.exporter.locating.locate import locate
from onnx_lora.exporter.locating.located import Occurrence
from onnx_lora.exporter.weights.torch_weights import read_module_weights
from onnx_lora.package import Package

__all__ = ["adopt_quantized"]

logger = logging.getLogger(__name__)


def adopt_quantized(package: Package, model: Any) -> None:
    """Put every weight that the package quantized, as it is there, into the torch model it was made from."""
    if not package.quantized:
        return
    checkpoint = read_module_weights(model, heads=heads_of(model))
    for info in package.manifest.graphs:
        graph = load(package.path / info.base_file).graph
        found = locate(graph, checkpoint)
        quantized = [one for one in found.occurrences if one.product.quantized is not None]
        if not any("BlockQuantized" in node.op_type for node in graph):
            _untie(model, {one.module for one in quantized})
        for one in quantized:
            _adopt(model, one)


def _untie(model: Any, modules: set[str]) -> None:
    """Give a tied head that alone was quantized a weight of its own: the embedding keeps the float one."""
    import torch

    embedding = model.get_input_embeddings()
    for name in modules:
        module = model.get_submodule(name)
        if module.weight is embedding.weight:
            module.weight = torch.nn.Parameter(module.weight.detach().clone())


def _adopt(model: Any, one: Occurrence) -> None:
    import torch

    weight = model.get_submodule(one.module).weight.data
    values = torch.from_numpy(np.ascontiguousarray(one.window())).to(weight.dtype)
    outputs = slice(one.first, one.first + one.outputs)
    if one.in_out:
        weight[:, outputs] = values
    else:
        weight[outputs] = values.T
