"""Checks that the readers of several kinds make before they take a weight: its type, its axes, its quantization."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from onnx_lora.exporter.graph.product import Operand, Quantized
from onnx_lora.exporter.graph.values import axes_of, is_constant, numpy_type_of, shape_of
from onnx_lora.points import FLOAT_TYPES
from onnx_lora.quantized import Scheme

__all__ = [
    "BYTES",
    "FLOATS",
    "NIBBLES",
    "computed_type",
    "is_dequantized",
    "reads_first",
    "turns_matrix",
    "unfit_float_type",
    "unfit_matrix",
    "unfit_quantized",
    "unfit_scheme",
    "with_zero_point",
]

# ONNX's names of the types that weights may have, plain and quantized.
FLOATS = ("FLOAT", "FLOAT16", "DOUBLE")
BYTES = ("INT8", "UINT8")
NIBBLES = ("INT4", "UINT4")


def unfit_matrix(weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> str | None:
    """Why a constant that is multiplied with is no module's matrix, or None."""
    if axes_of(weight) != 2 or weight.shape is None:
        return f"the weight has {axes_of(weight)} axes, not 2"
    if 0 in weight.shape.numpy():
        return "the weight is empty"
    return unfit_float_type(weight, wrappers)


def unfit_float_type(weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> str | None:
    """Why a weight's type, or one that it is cast to, is none that points take; or None."""
    stored = "of unknown type" if weight.dtype is None else weight.dtype.name
    if stored not in FLOATS:
        return f"the weight is {stored}, not one of {', '.join(FLOAT_TYPES)}"
    for wrapper in wrappers:
        if wrapper.op_type == "Cast":
            cast = ir.DataType(wrapper.attributes.get_int("to")).name
            if cast not in FLOATS:
                return f"the weight is cast to {cast}, not one of {', '.join(FLOAT_TYPES)}"
    return None


def unfit_quantized(weight: ir.Value | None, zero: ir.Value | None, types: Collection[str]) -> str | None:
    """Why a quantized matrix, or its zero point, is none of these types; or None."""
    if weight is None or axes_of(weight) != 2 or weight.shape is None or 0 in weight.shape.numpy():
        return f"the quantized weight has {axes_of(weight)} axes or no numbers"
    stored = None if weight.dtype is None else weight.dtype.name
    if stored not in types:
        return f"the quantized weight is {stored}, not one of {', '.join(types)}"
    if zero is not None and not is_constant(zero):
        return "its zero points are not constant"
    return None


def unfit_scheme(scheme: Scheme, weight: ir.Value, scale: ir.Value, zero: ir.Value | None) -> str | None:
    """Why a weight and what stands beside it are not of one scheme, or None."""
    zero_point = None if zero is None else (numpy_type_of(zero), shape_of(zero))
    problem = scheme.problem(shape_of(weight), shape_of(scale), zero_point)
    return None if problem is None else f"its quantization contradicts itself: {problem}"


def with_zero_point(scheme: Scheme, scale: Operand, node: ir.Node, position: int, zero: ir.Value | None) -> Quantized:
    """A quantization whose zero point, where it has one, is an input of `node`."""
    zero_point = None if zero is None else Operand(node, position, zero)
    return Quantized(scheme, scale, zero_point)


def is_dequantized(node: ir.Node | None) -> bool:
    """Whether a node makes floats of quantized numbers, by whichever operator."""
    return node is not None and "Dequantize" in node.op_type


def reads_first(node: ir.Node, position: int, weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> Operand:
    """The weight as the wrapper nearest to it reads it; `node` itself at `position`, where there is no wrapper."""
    if wrappers:
        return Operand(wrappers[-1], 0, weight)
    return Operand(node, position, weight)


def computed_type(weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> str:
    """numpy's name for the type that a weight has behind its wrappers."""
    for wrapper in wrappers:
        if wrapper.op_type == "Cast":
            return ir.DataType(wrapper.attributes.get_int("to")).numpy().name
    return numpy_type_of(weight)


def turns_matrix(wrappers: tuple[ir.Node, ...]) -> bool:
    """Whether wrappers together turn `[in, out]` into `[out, in]`. Without `perm` a Transpose reverses the axes."""
    turned = False
    for wrapper in wrappers:
        if wrapper.op_type != "Transpose":
            continue
        order = list(wrapper.attributes.get_ints("perm", [1, 0]))
        if order == [1, 0]:
            turned = not turned
    return turned
