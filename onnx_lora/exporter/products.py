"""The forms that a product with a constant weight takes in a graph, plain and quantized: one function a form.
It looks at one node and what stands around it; which module that is, it does not know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lora.kinds import EMBEDDING, LINEAR, Conv, Embedding, Kind
from onnx_lora.points import FLOAT_TYPES, Array
from onnx_lora.quantized import Scheme, dequantize, is_rounded

__all__ = ["Operand", "Product", "Quantized", "Unfit", "axes_of", "product_of", "unwrap"]

_FLOATS = ("FLOAT", "FLOAT16", "DOUBLE")
_BYTES = ("INT8", "UINT8")
_NIBBLES = ("INT4", "UINT4")

# Which input of a node is added to its product.
_BIASES = {"Conv": 2, "DynamicQuantizeMatMul": 4, "Gemm": 2, "MatMulNBits": 5}

# Operators between an initializer and the node that multiplies with it.
_WRAPPERS = ("Cast", "Identity", "Transpose")


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why a product with a weight is no linear module, and that weight where it is known."""

    reason: str
    weight: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Operand:
    """An initializer, and where it is read."""

    node: ir.Node
    position: int
    value: ir.Value


@dataclass(frozen=True, slots=True)
class Quantized:
    """How a weight is quantized, and the initializers beside it."""

    scheme: Scheme
    scale: Operand
    zero_point: Operand | None

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.scale,) if self.zero_point is None else (self.scale, self.zero_point)


@dataclass(frozen=True, slots=True)
class Product:
    """`output = source · W0` (and a bias, in some forms); a lookup of rows, or a convolution, by its `kind`.

    `node` multiplies; `reader` takes in the activation, before anything quantizes it; `output` is the product
    as a float. `weight` is the operand that holds W0; `wrappers` lead from it to the node, nearest to the node
    first. `transposed`: W0 is stored `[out, in]`, of a convolution `[out, channels / groups, *kernel]`. `dtype`: what
    the product is computed in. `inputs`, `outputs`: W0's own; of a convolution in groups, those of one.
    """

    node: ir.Node
    reader: ir.Node
    output: ir.Value
    weight: Operand
    transposed: bool
    inputs: int
    outputs: int
    dtype: str
    wrappers: tuple[ir.Node, ...] = ()
    quantized: Quantized | None = None
    kind: Kind = LINEAR

    @property
    def source(self) -> ir.Value:
        """The activation, as the graph has it now; of a lookup the rows' numbers."""
        value = self.reader.inputs[1 if isinstance(self.kind, Embedding) else 0]
        assert value is not None  # every form checks it
        return value

    @property
    def factor(self) -> int:
        """Which of the node's inputs W0 comes in by."""
        return 0 if isinstance(self.kind, Embedding) else 1

    @property
    def added(self) -> ir.Value | None:
        """What the node itself adds to the product: its bias."""
        position = _BIASES.get(self.node.op_type)
        return None if position is None else _input(self.node, position)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Every initializer that W0 is made of."""
        return (self.weight,) if self.quantized is None else (self.weight, *self.quantized.operands)

    @property
    def path(self) -> tuple[ir.Node, ...]:
        """The nodes between the weight and `node`."""
        maker = self.weight.node
        return self.wrappers if maker is self.node or maker in self.wrappers else (*self.wrappers, maker)

    def is_rounded(self, weight: Array) -> bool:
        """Whether the quantized weight is `weight` `[in, outputs]`, rounded to nearest."""
        assert self.quantized is not None  # of whom else
        quantized, zero = self.quantized, self.quantized.zero_point
        return is_rounded(
            quantized.scheme,
            (weight.T if self.transposed else weight).astype(np.float32, copy=False),
            _numbers(self.weight.value),
            _numbers(quantized.scale.value),
            None if zero is None else _numbers(zero.value),
        )

    def values(self) -> Array:
        """W0 as `[in, outputs]`; of a quantized weight in float32."""
        values = _numbers(self.weight.value)
        if self.quantized is not None:
            zero = self.quantized.zero_point
            zeros = None if zero is None else _numbers(zero.value)
            values = dequantize(self.quantized.scheme, values, _numbers(self.quantized.scale.value), zeros)
        matrix = values.reshape(len(values), -1)
        return matrix.T if self.transposed else matrix


def product_of(node: ir.Node) -> Product | Unfit | None:
    """The product that `node` is, why it is none though it has a weight, or None: another operator."""
    form = _FORMS.get((node.domain.replace("ai.onnx", ""), node.op_type))
    return None if form is None else form(node)


def unwrap(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """The initializer behind Transpose, Cast and Identity nodes, and those nodes; or None."""
    wrappers: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in _WRAPPERS:
        wrappers.append(node)
        value = node.inputs[0]
    return (value if _is_constant(value) else None), tuple(wrappers)


def axes_of(value: ir.Value | None) -> int | None:
    """The number of axes, or None where it cannot be told."""
    return None if value is None or value.shape is None else value.shape.rank()


def _plain(node: ir.Node) -> Product | Unfit | None:
    """MatMul and Gemm, with the weight as it is or dequantized on the way."""
    source, factor = _input(node, 0), _input(node, 1)
    weight, wrappers = unwrap(factor)
    maker = wrappers[-1].inputs[0] if wrappers else factor
    origin = None if maker is None else maker.producer()
    if weight is None and origin is not None and "Dequantize" in origin.op_type:
        return _dequantized(node, origin, wrappers)
    if weight is None:
        left, _ = unwrap(source)
        return Unfit("the weight is the left factor", left) if axes_of(left) == 2 else None
    reason = _unfit_gemm(node) or _unfit_weight(weight, wrappers)
    if reason is not None or source is None:
        return Unfit(reason or "it has no input", weight)
    reader = wrappers[-1] if wrappers else node
    operand = Operand(reader, 0 if wrappers else 1, weight)
    return _made(node, operand, wrappers, _computed(weight, wrappers))


_FIXED = "activations are rounded to ranges that were fixed without adapters; quantize weights only"


def _dequantized(node: ir.Node, maker: ir.Node, wrappers: tuple[ir.Node, ...]) -> Product | Unfit:
    """MatMul over DequantizeLinear: per tensor, per channel, or in blocks."""
    weight, scale, zero = (_input(maker, position) for position in range(3))
    if weight is None or not _is_constant(weight) or not _is_constant(scale):
        return Unfit("its weight is dequantized by what is not constant", weight)
    reason = _unfit_gemm(node) or _unfit_quantized(weight, zero, (*_BYTES, *_NIBBLES))
    if reason is None and any(wrapper.op_type == "Cast" for wrapper in wrappers):
        reason = "its weight is cast after it was dequantized"
    if reason is None and _producer(_input(node, 0), "DequantizeLinear") is not None:
        # Ranges measured without an adapter would cut off what it adds, without a word.
        reason = _FIXED
    if reason is None and any(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()):
        reason = _FIXED
    if maker.op_type != "DequantizeLinear" or reason is not None:
        return Unfit(reason or f"its weight comes from {maker.op_type}, which gets no point yet", weight)
    assert scale is not None
    rows, columns = _sizes(weight)
    size = maker.attributes.get_int("block_size", 0)
    axis = -1 if axes_of(scale) == 0 or _count(scale) == 1 else maker.attributes.get_int("axis", 1) % 2
    bits = 4 if weight.dtype is not None and weight.dtype.name in _NIBBLES else 8
    scheme = Scheme("affine", bits, size if axis >= 0 else 0, axis, rows, columns)
    if (reason := _misfit(scheme, weight, scale, zero)) is not None:
        return Unfit(reason, weight)
    quantized = Quantized(scheme, Operand(maker, 1, scale), None if zero is None else Operand(maker, 2, zero))
    return _made(node, Operand(maker, 0, weight), wrappers, _type(scale), quantized)


def _blocks(node: ir.Node) -> Product | Unfit | None:
    """MatMulNBits of ONNX Runtime: x, B, scales, zero points, order of the inputs, bias."""
    source, weight, scale, zero, order = (_input(node, position) for position in range(5))
    if not _is_constant(weight):
        return None
    if order is not None:
        return Unfit("its weight's inputs are in another order (g_idx), which gets no point yet", weight)
    if not _is_constant(scale) or not (zero is None or _is_constant(zero)):
        return Unfit("its scales or zero points are not constant", weight)
    bits, size = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    inputs, outputs = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    if bits not in (2, 4, 8) or size < 1 or inputs < 1 or outputs < 1:
        return Unfit(f"its weight has {bits} bits in blocks of {size}, which gets no point yet", weight)
    if node.attributes.get_int("weight_prepacked", 0):
        return Unfit("its weight is packed for one device", weight)
    if source is None:
        return Unfit("it has no input", weight)
    assert weight is not None
    assert scale is not None
    scheme = Scheme("blocks", bits, size, -1, outputs, inputs)
    if (reason := _misfit(scheme, weight, scale, zero)) is not None:
        return Unfit(reason, weight)
    quantized = Quantized(scheme, Operand(node, 2, scale), None if zero is None else Operand(node, 3, zero))
    operand, dtype = Operand(node, 1, weight), _type(source, scale)
    return Product(node, node, node.outputs[0], operand, True, inputs, outputs, dtype, quantized=quantized)


def _misfit(scheme: Scheme, weight: ir.Value, scale: ir.Value, zero: ir.Value | None) -> str | None:
    """Why a weight and what stands beside it are not of one scheme, or None."""
    zero_point = None if zero is None else (_type(zero), _dims(zero))
    problem = scheme.problem(_dims(weight), _dims(scale), zero_point)
    return None if problem is None else f"its quantization contradicts itself: {problem}"


def _integer(node: ir.Node) -> Product | Unfit | None:
    """MatMulInteger as ONNX Runtime's dynamic quantization writes it: the activation quantized before, and its
    scale and the weight's multiplied in behind a Cast."""
    weight, zero = _input(node, 1), _input(node, 3)
    if not _is_constant(weight):
        return None
    before = _producer(_input(node, 0), "DynamicQuantizeLinear")
    cast = _only_user(node.outputs[0], "Cast")
    product = None if cast is None else _only_user(cast.outputs[0], "Mul")
    if before is None or cast is None or product is None:
        return Unfit("it is no MatMulInteger of dynamic quantization", weight)
    scales = next((value for value in product.inputs if value is not cast.outputs[0]), None)
    both = _producer(scales, "Mul")
    position = -1 if both is None else next((i for i, value in enumerate(both.inputs) if _is_constant(value)), -1)
    if both is not None and len(list(both.outputs[0].uses())) > 1:
        return Unfit("the scale of its weight is another weight's too", weight)
    if both is None or position < 0 or both.inputs[1 - position] is not before.outputs[1]:
        return Unfit("the scale of its weight cannot be told", weight)
    scale = both.inputs[position]
    assert scale is not None  # it is constant
    return _dynamic(node, before, product.outputs[0], Operand(both, position, scale), zero)


def _dynamic_fused(node: ir.Node) -> Product | Unfit | None:
    """DynamicQuantizeMatMul of ONNX Runtime: x, B, scale, zero point, bias."""
    weight, scale, zero = (_input(node, position) for position in (1, 2, 3))
    if not _is_constant(weight):
        return None
    if scale is None or not _is_constant(scale):
        return Unfit("its scales are not constant", weight)
    return _dynamic(node, node, node.outputs[0], Operand(node, 2, scale), zero)


def _dynamic(
    node: ir.Node, reader: ir.Node, output: ir.Value, scale: Operand, zero: ir.Value | None
) -> Product | Unfit:
    weight, source = _input(node, 1), _input(reader, 0)
    reason = _unfit_quantized(weight, zero, _BYTES)
    if reason is not None or source is None or weight is None:
        return Unfit(reason or "it has no input", weight)
    rows, columns = _sizes(weight)
    axis = -1 if _count(scale.value) == 1 else 1
    scheme = Scheme("affine", 8, 0, axis, rows, columns)
    if (reason := _misfit(scheme, weight, scale.value, zero)) is not None:
        return Unfit(reason, weight)
    quantized = Quantized(scheme, scale, None if zero is None else Operand(node, 3, zero))
    operand, dtype = Operand(node, 1, weight), _type(source, scale.value)
    return Product(node, reader, output, operand, False, rows, columns, dtype, quantized=quantized)


def _lookup(node: ir.Node) -> Product | Unfit | None:
    """Gather of rows of a table: an embedding, if the table is one's."""
    table, wrappers = unwrap(_input(node, 0))
    if table is None or axes_of(table) != 2 or node.attributes.get_int("axis", 0) != 0:
        return None
    if table.dtype is None or table.dtype.name not in _FLOATS or _input(node, 1) is None:
        return None
    if (reason := _unfit_weight(table, wrappers)) is not None:
        return Unfit(reason, table)
    # A head's weight that is looked up too is turned on the way.
    transposed = sum(_swaps(wrapper) for wrapper in wrappers) % 2 == 1
    operand = Operand(wrappers[-1] if wrappers else node, 0, table)
    rows, columns = reversed(_sizes(table)) if transposed else _sizes(table)
    dtype = _computed(table, wrappers)
    return Product(node, node, node.outputs[0], operand, transposed, rows, columns, dtype, wrappers, kind=EMBEDDING)


def _lookup_in_blocks(node: ir.Node) -> Product | Unfit | None:
    """GatherBlockQuantized of ONNX Runtime: table, rows, scales, zero points. The table may be a head's weight
    (MatMulNBits) in another shape."""
    table, scale, zero = (_input(node, position) for position in (0, 2, 3))
    reshape = _producer(table, "Reshape")
    weight = table if reshape is None else _input(reshape, 0)
    if weight is None or not _is_constant(weight):
        return None
    if not _is_constant(scale) or not (zero is None or _is_constant(zero)):
        return Unfit("its scales or zero points are not constant", weight)
    assert scale is not None
    if node.attributes.get_int("gather_axis", 0) != 0 or node.attributes.get_int("quantize_axis", 1) % 2 != 1:
        return Unfit("it is quantized along its entries", weight)
    size, kind = node.attributes.get_int("block_size", 128), "" if weight.dtype is None else weight.dtype.name
    if axes_of(scale) != 2 or kind not in ("UINT8", *_NIBBLES):
        return Unfit(f"its table is {kind}, not one of UINT8, {', '.join(_NIBBLES)}", weight)
    rows, blocks = _sizes(scale)
    if kind in _NIBBLES:
        scheme = Scheme("affine", 4, size, 1, rows, _dims(weight)[-1])
    else:
        scheme = Scheme("blocks", node.attributes.get_int("bits", 4), size, -1, rows, blocks * size)
    if (reason := _misfit(scheme, weight, scale, zero)) is not None:
        return Unfit(reason, weight)
    quantized = Quantized(scheme, Operand(node, 2, scale), None if zero is None else Operand(node, 3, zero))
    operand = Operand(node if reshape is None else reshape, 0, weight)
    return Product(
        *(node, node, node.outputs[0], operand, False, rows, scheme.columns, _type(scale)),
        quantized=quantized,
        kind=EMBEDDING,
    )


def _convolution(node: ir.Node) -> Product | Unfit | None:
    """Conv of any number of axes. PEFT's A has the base's kernel, stride and padding, no dilation and no groups."""
    weight, wrappers = unwrap(_input(node, 1))
    origin = None if _input(node, 1) is None else node.inputs[1].producer()  # type: ignore[union-attr]
    if weight is None:
        quantized = origin is not None and "Dequantize" in origin.op_type
        return Unfit("its weight is quantized, which gets no point in a convolution") if quantized else None
    source, rank = _input(node, 0), axes_of(weight)
    if source is None or rank is None or rank < 3 or weight.shape is None or 0 in weight.shape.numpy():
        return Unfit("the weight is no convolution's", weight)
    reason = _unfit_type(weight, wrappers) or _unfit_padding(source)
    if any(wrapper.op_type == "Transpose" for wrapper in wrappers):
        reason = "the weight is transposed on the way"
    outputs, channels, *kernel = (int(size) for size in weight.shape.numpy())
    groups = node.attributes.get_int("group", 1)
    if groups < 1 or outputs % groups:
        reason = f"{outputs} outputs cannot be in {groups} groups"
    dilated = any(step != 1 for step in node.attributes.get_ints("dilations", []) or [])
    if reason is None and dilated and math.prod(kernel) != 1:
        reason = "it is dilated, and PEFT's A is not: their outputs do not meet"
    if reason is not None:
        return Unfit(reason, weight)
    operand = Operand(wrappers[-1] if wrappers else node, 0 if wrappers else 1, weight)
    return Product(
        *(node, node, node.outputs[0], operand, True, channels * math.prod(kernel), outputs),
        dtype=_computed(weight, wrappers),
        wrappers=wrappers,
        kind=Conv(tuple(kernel), groups),
    )


def _unfit_padding(source: ir.Value) -> str | None:
    """Why what a convolution reads may have been padded by itself, otherwise than PEFT's A pads; or None."""
    maker = source.producer()
    if maker is None:
        return None
    mode = maker.attributes.get_string("mode", "constant") if maker.op_type == "Pad" else "constant"
    # torch writes circular padding as Concat along the axes of space; channels are axis 1.
    around = maker.op_type == "Concat" and maker.attributes.get_int("axis", 1) != 1
    if mode == "constant" and not around:
        return None
    return f"its input is padded ({'circular' if around else mode}), and PEFT's A would pad with zeros"


_FORMS: dict[tuple[str, str], Callable[[ir.Node], Product | Unfit | None]] = {
    ("", "MatMul"): _plain,
    ("", "Gemm"): _plain,
    ("", "Conv"): _convolution,
    ("", "Gather"): _lookup,
    ("com.microsoft", "GatherBlockQuantized"): _lookup_in_blocks,
    ("com.microsoft", "MatMulNBits"): _blocks,
    ("", "MatMulInteger"): _integer,
    ("com.microsoft", "DynamicQuantizeMatMul"): _dynamic_fused,
}


def _made(
    node: ir.Node,
    weight: Operand,
    wrappers: tuple[ir.Node, ...],
    dtype: str,
    quantized: Quantized | None = None,
) -> Product:
    """A MatMul's or Gemm's product, with the orientation that wrappers and attributes give its weight."""
    transposes = sum(_swaps(wrapper) for wrapper in wrappers) + node.attributes.get_int("transB", 0)
    transposed = bool(transposes % 2)
    rows, columns = _sizes(weight.value)
    inputs, outputs = (columns, rows) if transposed else (rows, columns)
    return Product(node, node, node.outputs[0], weight, transposed, inputs, outputs, dtype, wrappers, quantized)


def _unfit_weight(weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> str | None:
    """Why a constant that is multiplied with is no linear module's weight, or None."""
    if axes_of(weight) != 2 or weight.shape is None:
        return f"the weight has {axes_of(weight)} axes, not 2"
    if 0 in weight.shape.numpy():
        return "the weight is empty"
    return _unfit_type(weight, wrappers)


def _unfit_type(weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> str | None:
    stored = "of unknown type" if weight.dtype is None else weight.dtype.name
    if stored not in _FLOATS:
        return f"the weight is {stored}, not one of {', '.join(FLOAT_TYPES)}"
    casts = [ir.DataType(wrapper.attributes.get_int("to")) for wrapper in wrappers if wrapper.op_type == "Cast"]
    if odd := [kind.name for kind in casts if kind.name not in _FLOATS]:
        return f"the weight is cast to {odd[0]}, not one of {', '.join(FLOAT_TYPES)}"
    return None


def _unfit_gemm(node: ir.Node) -> str | None:
    if node.op_type != "Gemm":
        return None
    if node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return "a Gemm with transA or alpha is no linear module"
    return None if node.attributes.get_float("beta", 1.0) == 1.0 else "a Gemm with beta is no linear module"


def _unfit_quantized(weight: ir.Value | None, zero: ir.Value | None, types: tuple[str, ...]) -> str | None:
    if weight is None or axes_of(weight) != 2 or weight.shape is None or 0 in weight.shape.numpy():
        return f"the quantized weight has {axes_of(weight)} axes or no numbers"
    if weight.dtype is None or weight.dtype.name not in types:
        return f"the quantized weight is {weight.dtype and weight.dtype.name}, not one of {', '.join(types)}"
    return None if zero is None or _is_constant(zero) else "its zero points are not constant"


def _computed(weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> str:
    for wrapper in wrappers:
        if wrapper.op_type == "Cast":
            return ir.DataType(wrapper.attributes.get_int("to")).numpy().name
    return _type(weight)


def _type(*values: ir.Value) -> str:
    """Of the first value whose type is known."""
    return next((value.dtype.numpy().name for value in values if value.dtype is not None), "unknown")


def _swaps(wrapper: ir.Node) -> bool:
    """Whether it turns `[in, out]` into `[out, in]`. Without `perm` a Transpose reverses the axes."""
    return wrapper.op_type == "Transpose" and list(wrapper.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if len(node.inputs) > position else None


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _only_user(value: ir.Value, kind: str) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == kind and not value.is_graph_output() else None


def _sizes(value: ir.Value) -> tuple[int, int]:
    assert value.shape is not None
    rows, columns = (int(size) for size in value.shape.numpy())
    return rows, columns


def _dims(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape.numpy())


def _count(value: ir.Value | None) -> int:
    assert value is not None
    assert value.const_value is not None
    return int(value.const_value.size)


def _numbers(value: ir.Value) -> Array:
    """An initializer's numbers; 4-bit ones as 8-bit ones, which numpy can compute with."""
    assert value.const_value is not None
    numbers: Array = value.const_value.numpy()
    name = numbers.dtype.name
    return numbers.astype(np.int8 if name == "int4" else np.uint8) if name in ("int4", "uint4") else numbers
