"""Loading an ONNX file and refusing a damaged one, before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveInitializersFromInputsPass,
)

from onnx_lora.errors import ModelError
from onnx_lora.exporter.foreign import foreign
from onnx_lora.exporter.functions import inline_functions
from onnx_lora.exporter.intake import read_model

__all__ = ["check", "load"]

# Constants of a graph become initializers from this many elements on: smaller ones are shapes and axes.
_WEIGHT_ELEMENTS = 64


def load(file: Path) -> ir.Model:
    """The model of a file: functions inlined, weights as initializers of the main graph.

    Raises ModelError: there is no such file, or no sound model in it.
    """
    model = read_model(file)
    if not model.graph.outputs:
        raise ModelError("must be an ONNX model, and has no outputs", path=file)
    if not all(isinstance(name, str) for name in _names(model.graph)):
        raise ModelError("must be valid ONNX, and has names that are no text", path=file)
    check(file, file)
    inline_functions(model, file)
    with foreign("lifting its constants", file):
        LiftSubgraphInitializersToMainGraphPass()(model)
        RemoveInitializersFromInputsPass()(model)
        LiftConstantsToInitializersPass(size_limit=_WEIGHT_ELEMENTS)(model)
    _take_in_constants(model.graph, file)
    # Optional inputs came with version 4; nothing that runs today needs an older one than 8.
    model.ir_version = max(model.ir_version or 0, 8)
    return model


def _take_in_constants(graph: ir.Graph, file: Path) -> None:
    """Read small constants that lie in a data file, where Optimum puts them in models of more than 2 GB: shapes
    depend on them. Raises ModelError: the file was cut off."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for name, attribute in node.attributes.items():
            tensor = attribute.value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            with foreign(f"reading the constant of {node.name}", file):
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(tensor.numpy().copy(), name=tensor.name))


def check(file: Path, source: Path) -> None:
    """Raises ModelError: `file`, which is or was made from `source`, is not valid ONNX."""
    try:
        onnx.checker.check_model(str(file))
    except Exception as error:  # noqa: BLE001 - a foreign tool on a foreign file
        # ONNX Runtime has operators of its own in ONNX's domain (SimplifiedLayerNormalization); the checker
        # stops at the first.
        if not str(error).startswith("No Op registered for") or "SimplifiedLayerNormalization" not in str(error):
            raise ModelError(f"must be valid ONNX: {error}", path=source) from error


def _names(graph: ir.Graph) -> Iterator[object]:
    """What a damaged file may hold as bytes; names that are missing do not count."""
    yield from (value.name or "" for value in (*graph.inputs, *graph.initializers.values()))
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from (node.name or "", node.op_type, node.domain, *node.attributes)
        yield from (value.name or "" for value in (*node.inputs, *node.outputs) if value is not None)
