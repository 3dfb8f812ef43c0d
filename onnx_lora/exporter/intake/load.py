"""Loading an ONNX file and refusing a damaged one, before anything is made of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveInitializersFromInputsPass,
)

from onnx_lora.errors import ModelError
from onnx_lora.exporter.foreign_libraries import Failure, attempt, name_step
from onnx_lora.exporter.intake.functions import inline_functions, settle_functions
from onnx_lora.exporter.intake.onnx_file import read_model

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
    settle_functions(model, file)
    check(file, file)
    inline_functions(model, file)
    with name_step("lifting its constants", file):
        LiftSubgraphInitializersToMainGraphPass()(model)
        RemoveInitializersFromInputsPass()(model)
        LiftConstantsToInitializersPass(size_limit=_WEIGHT_ELEMENTS)(model)
    _take_in_constants(model.graph, file)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            # An initializer is what its tensor is, whatever else the file notes under its name.
            value.shape = ir.Shape(value.const_value.shape.numpy())
            value.type = ir.TensorType(value.const_value.dtype)
    # Optional inputs came with version 4; nothing that runs today needs an older one than 8.
    model.ir_version = max(model.ir_version or 0, 8)
    return model


def _take_in_constants(graph: ir.Graph, file: Path) -> None:
    """Read small constants that lie in a data file, where Optimum puts them in models of more than 2 GB: shapes
    depend on them. Raises ModelError: the file was cut off, or what stands there is no constant."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                raise ModelError(f"{node.name} must have a value for {name}, and refers to a function's", path=file)
            tensor = attribute.value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            with name_step(f"reading the constant of {node.name}", file):
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(tensor.numpy().copy(), name=tensor.name))


def check(file: Path, source: Path) -> None:
    """Raises ModelError: `file`, which is or was made from `source`, is not valid ONNX."""
    checked = attempt(lambda: onnx.checker.check_model(str(file)))
    if not isinstance(checked, Failure):
        return
    said = str(checked.error)
    # ONNX Runtime has operators of its own in ONNX's domain (SimplifiedLayerNormalization); the checker
    # stops at the first. So it does at data files that are links, as the hub's cache has them; `intake` has judged
    # where they lead.
    is_operator_of_ort = said.startswith("No Op registered for") and "SimplifiedLayerNormalization" in said
    if not is_operator_of_ort and not said.endswith("but it is a symbolic link."):
        raise ModelError(f"must be valid ONNX: {checked.error}", path=source) from checked.error
