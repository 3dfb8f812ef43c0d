"""Linear modules in graphs: MatMul and Gemm, plain and dequantized, and ONNX Runtime's quantized products."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lora.exporter.graph.product import Operand, Product, Quantized, Unfit
from onnx_lora.exporter.graph.values import (
    axes_of,
    count_of,
    initializer_behind,
    input_at,
    is_constant,
    numpy_type_of,
    only_user,
    producer_of,
    rows_and_columns,
    unwrap,
)
from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind
from onnx_lora.exporter.graph_kinds.reading import (
    BYTES,
    NIBBLES,
    computed_type,
    is_dequantized,
    reads_first,
    turns_matrix,
    unfit_matrix,
    unfit_quantized,
    unfit_scheme,
    with_zero_point,
)
from onnx_lora.exporter.surgery.branches import BranchInputs, broadcast
from onnx_lora.exporter.surgery.surgeon import Surgeon
from onnx_lora.kinds import Linear
from onnx_lora.quantized import Scheme

__all__ = ["LINEAR_IN_GRAPHS"]

# Why a product between quantized activations gets no point.
_FIXED = "activations are rounded to ranges that were fixed without adapters; quantize weights only"

# Which input of a Gemm, and of ONNX Runtime's own operators, is added to the product.
_GEMM_BIAS = 2
_BLOCKS_BIAS = 5
_DYNAMIC_BIAS = 4


def _read_product(node: ir.Node) -> Product | Unfit | None:
    """MatMul and Gemm, with the weight as it is or dequantized on the way."""
    source = input_at(node, 0)
    factor = input_at(node, 1)
    weight, wrappers = unwrap(factor)
    if weight is None:
        behind = wrappers[-1].inputs[0] if wrappers else factor
        maker = None if behind is None else behind.producer()
        if maker is not None and is_dequantized(maker):
            return _read_dequantized(node, maker, wrappers)
        left = initializer_behind(source)
        if axes_of(left) == 2:
            return Unfit("the weight is the left factor", left)
        return None
    reason = _unfit_gemm(node) or unfit_matrix(weight, wrappers)
    if reason is None and source is None:
        reason = "it has no input"
    if reason is not None:
        return Unfit(reason, weight)
    operand = reads_first(node, 1, weight, wrappers)
    dtype = computed_type(weight, wrappers)
    return _make_product(node, operand, wrappers, dtype, None)


def _read_dequantized(node: ir.Node, maker: ir.Node, wrappers: tuple[ir.Node, ...]) -> Product | Unfit:
    """MatMul or Gemm over DequantizeLinear, with scales for the whole weight, for each channel, or for blocks."""
    weight = input_at(maker, 0)
    scale = input_at(maker, 1)
    zero = input_at(maker, 2)
    if weight is None or not is_constant(weight) or not is_constant(scale):
        return Unfit("its weight is dequantized by what is not constant", weight)
    reason = _unfit_gemm(node) or unfit_quantized(weight, zero, (*BYTES, *NIBBLES))
    if reason is None:
        reason = _unfit_dequantizing(node, maker, wrappers)
    if reason is not None:
        return Unfit(reason, weight)
    assert scale is not None
    scheme = _affine_scheme(maker, weight, scale)
    reason = unfit_scheme(scheme, weight, scale, zero)
    if reason is not None:
        return Unfit(reason, weight)
    quantized = with_zero_point(scheme, Operand(maker, 1, scale), maker, 2, zero)
    return _make_product(node, Operand(maker, 0, weight), wrappers, numpy_type_of(scale), quantized)


def _unfit_dequantizing(node: ir.Node, maker: ir.Node, wrappers: tuple[ir.Node, ...]) -> str | None:
    """Why the nodes around a product of a dequantized weight leave no place for a branch, or None."""
    if any(wrapper.op_type == "Cast" for wrapper in wrappers):
        return "its weight is cast after it was dequantized"
    # Ranges measured without an adapter would cut off what it adds, without a word.
    if producer_of(input_at(node, 0), "DequantizeLinear") is not None:
        return _FIXED
    if any(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()):
        return _FIXED
    if maker.op_type != "DequantizeLinear":
        return f"its weight comes from {maker.op_type}, which gets no point yet"
    return None


def _affine_scheme(maker: ir.Node, weight: ir.Value, scale: ir.Value) -> Scheme:
    """The scheme of a DequantizeLinear; axis -1 stands for one scale."""
    rows, columns = rows_and_columns(weight)
    is_nibbles = weight.dtype is not None and weight.dtype.name in NIBBLES
    bits = 4 if is_nibbles else 8
    if axes_of(scale) == 0 or count_of(scale) == 1:
        return Scheme("affine", bits, 0, -1, rows, columns)
    axis = maker.attributes.get_int("axis", 1) % 2
    block_size = maker.attributes.get_int("block_size", 0)
    return Scheme("affine", bits, block_size, axis, rows, columns)


def _read_blocks(node: ir.Node) -> Product | Unfit | None:
    """MatMulNBits of ONNX Runtime: x, B, scales, zero points, order of the inputs, bias."""
    source = input_at(node, 0)
    weight = input_at(node, 1)
    scale = input_at(node, 2)
    zero = input_at(node, 3)
    if not is_constant(weight):
        return None
    if input_at(node, 4) is not None:
        return Unfit("its weight's inputs are in another order (g_idx), which gets no point yet", weight)
    if not is_constant(scale) or not (zero is None or is_constant(zero)):
        return Unfit("its scales or zero points are not constant", weight)
    bits = node.attributes.get_int("bits", 4)
    size = node.attributes.get_int("block_size", 0)
    inputs = node.attributes.get_int("K", 0)
    outputs = node.attributes.get_int("N", 0)
    if bits not in (2, 4, 8) or size < 1 or inputs < 1 or outputs < 1:
        return Unfit(f"its weight has {bits} bits in blocks of {size}, which gets no point yet", weight)
    if node.attributes.get_int("weight_prepacked", 0):
        return Unfit("its weight is packed for one device", weight)
    if source is None:
        return Unfit("it has no input", weight)
    assert weight is not None
    assert scale is not None
    scheme = Scheme("blocks", bits, size, -1, outputs, inputs)
    reason = unfit_scheme(scheme, weight, scale, zero)
    if reason is not None:
        return Unfit(reason, weight)
    return Product(
        node=node,
        reader=node,
        output=node.outputs[0],
        weight=Operand(node, 1, weight),
        transposed=True,
        inputs=inputs,
        outputs=outputs,
        dtype=numpy_type_of(source, scale),
        quantized=with_zero_point(scheme, Operand(node, 2, scale), node, 3, zero),
        bias_input=_BLOCKS_BIAS,
    )


def _read_integer(node: ir.Node) -> Product | Unfit | None:
    """MatMulInteger as ONNX Runtime's dynamic quantization writes it: the activation quantized before, and its
    scale and the weight's multiplied in behind a Cast."""
    weight = input_at(node, 1)
    zero = input_at(node, 3)
    if not is_constant(weight):
        return None
    before = producer_of(input_at(node, 0), "DynamicQuantizeLinear")
    cast = only_user(node.outputs[0], "Cast")
    product = None if cast is None else only_user(cast.outputs[0], "Mul")
    if before is None or cast is None or product is None:
        return Unfit("it is no MatMulInteger of dynamic quantization", weight)
    scales = next((value for value in product.inputs if value is not cast.outputs[0]), None)
    both = producer_of(scales, "Mul")  # the scale of the activation, times the weight's
    if both is None:
        return Unfit("the scale of its weight cannot be told", weight)
    if len(list(both.outputs[0].uses())) > 1:
        return Unfit("the scale of its weight is another weight's too", weight)
    position = next((index for index, value in enumerate(both.inputs) if is_constant(value)), None)
    if position is None or both.inputs[1 - position] is not before.outputs[1]:
        return Unfit("the scale of its weight cannot be told", weight)
    scale = both.inputs[position]
    assert scale is not None  # it is constant
    return _make_dynamic(node, before, product.outputs[0], Operand(both, position, scale), zero)


def _read_dynamic(node: ir.Node) -> Product | Unfit | None:
    """DynamicQuantizeMatMul of ONNX Runtime: x, B, scale, zero point, bias."""
    weight = input_at(node, 1)
    scale = input_at(node, 2)
    zero = input_at(node, 3)
    if not is_constant(weight):
        return None
    if scale is None or not is_constant(scale):
        return Unfit("its scales are not constant", weight)
    operand = Operand(node, 2, scale)
    return _make_dynamic(node, node, node.outputs[0], operand, zero, bias_input=_DYNAMIC_BIAS)


def _make_dynamic(
    node: ir.Node,
    reader: ir.Node,
    output: ir.Value,
    scale: Operand,
    zero: ir.Value | None,
    bias_input: int | None = None,
) -> Product | Unfit:
    """A product of a weight of 8 bits with an activation that is rounded on the way."""
    weight = input_at(node, 1)
    source = input_at(reader, 0)
    reason = unfit_quantized(weight, zero, BYTES)
    if reason is not None or source is None or weight is None:
        return Unfit(reason or "it has no input", weight)
    rows, columns = rows_and_columns(weight)
    axis = -1 if count_of(scale.value) == 1 else 1
    scheme = Scheme("affine", 8, 0, axis, rows, columns)
    reason = unfit_scheme(scheme, weight, scale.value, zero)
    if reason is not None:
        return Unfit(reason, weight)
    return Product(
        node=node,
        reader=reader,
        output=output,
        weight=Operand(node, 1, weight),
        transposed=False,
        inputs=rows,
        outputs=columns,
        dtype=numpy_type_of(source, scale.value),
        quantized=with_zero_point(scheme, scale, node, 3, zero),
        bias_input=bias_input,
    )


def _make_product(
    node: ir.Node, weight: Operand, wrappers: tuple[ir.Node, ...], dtype: str, quantized: Quantized | None
) -> Product:
    """A MatMul's or Gemm's product, with the orientation that wrappers and attributes give its weight."""
    transposed = turns_matrix(wrappers)
    if node.attributes.get_int("transB", 0) % 2:
        transposed = not transposed
    rows, columns = rows_and_columns(weight.value)
    return Product(
        node=node,
        reader=node,
        output=node.outputs[0],
        weight=weight,
        transposed=transposed,
        inputs=columns if transposed else rows,
        outputs=rows if transposed else columns,
        dtype=dtype,
        wrappers=wrappers,
        quantized=quantized,
        bias_input=_GEMM_BIAS if node.op_type == "Gemm" else None,
    )


def _unfit_gemm(node: ir.Node) -> str | None:
    """Why a Gemm computes more than x · W0 + b, or None; a MatMul never does."""
    if node.op_type != "Gemm":
        return None
    if node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return "a Gemm with transA or alpha is no linear module"
    if node.attributes.get_float("beta", 1.0) != 1.0:
        return "a Gemm with beta is no linear module"
    return None


class _LinearBranch:
    """`[batch, ..., in]` to `[batch, ..., out]` by two products."""

    def build_delta(self, surgeon: Surgeon, given: BranchInputs) -> ir.Value:
        a = broadcast(surgeon, given.a, given.view.rank)
        low = surgeon.op("MatMul", given.view.value, a, name=f"{given.name}.lora_A")
        b = broadcast(surgeon, given.b, given.view.rank)
        return surgeon.op("MatMul", low, b, name=f"{given.name}.lora_B")

    def shape_scale(self, surgeon: Surgeon, scale: ir.Value, product: Product, rank: int, name: str) -> ir.Value:
        del product, name
        return broadcast(surgeon, scale, rank)

    def shape_bias(self, surgeon: Surgeon, bias: ir.Value, product: Product, name: str) -> ir.Value:
        del surgeon, product, name
        return bias


LINEAR_IN_GRAPHS = GraphKind(
    kind=Linear,
    forms={
        ("", "MatMul"): _read_product,
        ("", "Gemm"): _read_product,
        ("com.microsoft", "MatMulNBits"): _read_blocks,
        ("", "MatMulInteger"): _read_integer,
        ("com.microsoft", "DynamicQuantizeMatMul"): _read_dynamic,
    },
    builder=_LinearBranch(),
    torch_classes=("Linear", "Conv1D"),
    calls="linear|addmm|mm",
    layouts=(False, True),
    is_linear=True,
)
