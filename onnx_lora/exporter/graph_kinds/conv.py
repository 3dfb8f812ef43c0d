"""Convolutions in graphs, of any number of axes. PEFT's A has the base's kernel, stride and padding, no dilation and no
groups."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from onnx_lora.exporter.graph.product import Product, Unfit
from onnx_lora.exporter.graph.values import axes_of, input_at, unwrap
from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind
from onnx_lora.exporter.graph_kinds.reading import computed_type, is_dequantized, reads_first, unfit_float_type
from onnx_lora.exporter.surgery.branches import BranchInputs, gather_number, number_own_rows
from onnx_lora.exporter.surgery.surgeon import Surgeon
from onnx_lora.kinds import Conv

__all__ = ["CONV_IN_GRAPHS"]

# Attributes of a Conv that PEFT's A shares with the base. It has neither dilation nor groups.
_SHARED = ("auto_pad", "kernel_shape", "pads", "strides")

# The axis of channels, in what a convolution reads and gives.
_CHANNELS = 1

_BIAS = 2


def _read(node: ir.Node) -> Product | Unfit | None:
    """Conv: the input, the kernel, a bias."""
    factor = input_at(node, 1)
    weight, wrappers = unwrap(factor)
    if weight is None:
        if factor is not None and is_dequantized(factor.producer()):
            return Unfit("its weight is quantized, which gets no point in a convolution")
        return None
    source = input_at(node, 0)
    axes = axes_of(weight)
    if source is None or axes is None or axes < 3 or weight.shape is None or 0 in weight.shape.numpy():
        return Unfit("the weight is no convolution's", weight)
    outputs, channels, *kernel = (int(size) for size in weight.shape.numpy())
    groups = node.attributes.get_int("group", 1)
    reason = (
        _unfit_groups(outputs, groups)
        or _unfit_wrappers(wrappers)
        or unfit_float_type(weight, wrappers)
        or _unfit_padding(source)
        or _unfit_dilation(node, kernel)
    )
    if reason is not None:
        return Unfit(reason, weight)
    return Product(
        node=node,
        reader=node,
        output=node.outputs[0],
        weight=reads_first(node, 1, weight, wrappers),
        transposed=True,
        inputs=channels * math.prod(kernel),
        outputs=outputs,
        dtype=computed_type(weight, wrappers),
        wrappers=wrappers,
        kind=Conv(tuple(kernel), groups),
        bias_input=_BIAS,
    )


def _unfit_groups(outputs: int, groups: int) -> str | None:
    """Why so many outputs cannot be cut into groups, or None."""
    if groups < 1 or outputs % groups:
        return f"{outputs} outputs cannot be in {groups} groups"
    return None


def _unfit_wrappers(wrappers: Sequence[ir.Node]) -> str | None:
    """Why a kernel's axes have another order than torch's, or None."""
    for wrapper in wrappers:
        if wrapper.op_type == "Transpose":
            return "the weight is transposed on the way"
    return None


def _unfit_padding(source: ir.Value) -> str | None:
    """Why what a convolution reads may have been padded by itself, otherwise than PEFT's A pads; or None."""
    maker = source.producer()
    if maker is None:
        return None
    padding = "constant"
    if maker.op_type == "Pad":
        padding = maker.attributes.get_string("mode", "constant") or "constant"
    elif maker.op_type == "Concat" and maker.attributes.get_int("axis", _CHANNELS) != _CHANNELS:
        padding = "circular"  # which torch writes as a Concat along the axes of space
    if padding == "constant":
        return None
    return f"its input is padded ({padding}), and PEFT's A would pad with zeros"


def _unfit_dilation(node: ir.Node, kernel: list[int]) -> str | None:
    """Why a dilated kernel, which A's is not, does not meet A's outputs; or None."""
    steps = node.attributes.get_ints("dilations", []) or []
    if math.prod(kernel) == 1 or all(step == 1 for step in steps):
        return None
    return "it is dilated, and PEFT's A is not: their outputs do not meet"


def _refuse(module: Any, plain: type) -> str | None:
    """Why PEFT's convolution A beside a torch module would read other numbers than the module does, or None."""
    if getattr(type(module), "_conv_forward", None) is not vars(plain).get("_conv_forward"):
        return f"{type(module).__name__} convolves in a way of its own"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"it pads with {getattr(module, 'padding_mode', '')} values, and PEFT's A beside it with zeros"
    if not _is_made_like(type(module)):
        return f"PEFT makes A and B by the module's class, and {type(module).__name__} is not made as a convolution is"
    return None


def _is_made_like(kind: type) -> bool:
    """Whether a class is made from the arguments that PEFT's A and B are made from."""
    signature = inspect.signature(kind)
    try:
        signature.bind(1, 1, 1, 1, 0, bias=False)
        signature.bind(1, 1, 1, 1, groups=1, bias=False)
    except TypeError:
        return False
    return True


class _ConvBranch:
    """A as a kernel of the base's size, B as a product for each place.

    With rows, A of all rows is applied to each (a convolution cannot choose), and what is another row's is set to
    zero before B.
    """

    def build_delta(self, surgeon: Surgeon, given: BranchInputs) -> ir.Value:
        name = given.name
        space = list(range(2, 2 + len(_kernel_of(given.product))))  # the axes behind batch and channels
        low = _convolve(surgeon, given)
        if given.per_row:
            mask = _mask_of_own_channels(surgeon, given, space)
            low = surgeon.op("Mul", low, mask, name=f"{name}.own")
        # B is multiplied by a MatMul, not by a Conv: over no channels (rank 0) ONNX Runtime's MatMul makes zeros, and
        # its Conv leaves whatever was in the memory. No Transpose of three axes may stand before the MatMul: the
        # optimiser would fuse the two to a FusedMatMul, which behaves as the Conv does.
        is_line = len(space) == 1
        if is_line:
            low = surgeon.unsqueeze(low, [3], name=f"{name}.plane")
            space = [2, 3]
        last = surgeon.op("Transpose", low, name=f"{name}.channels_last", perm=[0, *space, 1])
        b = surgeon.op("Flatten", given.b, name=f"{name}.lora_B_flat", axis=2)
        total = surgeon.op("MatMul", last, b, name=f"{name}.lora_B")
        back = [0, space[-1], *range(1, space[-1])]
        first = surgeon.op("Transpose", total, name=f"{name}.channels_first", perm=back)
        if is_line:
            return surgeon.squeeze(first, [3], name=f"{name}.line")
        return first

    def shape_scale(self, surgeon: Surgeon, scale: ir.Value, product: Product, rank: int, name: str) -> ir.Value:
        """`[rows, out, 1, ...]`."""
        del rank
        turned = surgeon.op("Transpose", scale, name=f"{name}.dora_channels", perm=[0, 2, 1])
        axes = len(_kernel_of(product))
        if axes == 1:
            return turned
        space = list(range(3, 2 + axes))
        return surgeon.unsqueeze(turned, space, name=f"{name}.dora_space")

    def shape_bias(self, surgeon: Surgeon, bias: ir.Value, product: Product, name: str) -> ir.Value:
        """`[out, 1, ...]`."""
        axes = len(_kernel_of(product))
        space = list(range(1, 1 + axes))
        return surgeon.unsqueeze(bias, space, name=f"{name}.bias_channels")


def _kernel_of(product: Product) -> tuple[int, ...]:
    assert isinstance(product.kind, Conv)  # this builder is registered for no other kind
    return product.kind.kernel


def _convolve(surgeon: Surgeon, given: BranchInputs) -> ir.Value:
    """x with A as its kernel: `[batch, rows · rank, ...]`."""
    name = given.name
    conv = given.product.kind
    inputs = conv.branch_inputs(given.product.inputs)
    channels, *kernel = conv.factor_shape(inputs)
    by_rank = surgeon.op("Transpose", given.a, name=f"{name}.lora_A_by_rank", perm=[0, 2, 1])
    flat = surgeon.op("Flatten", by_rank, name=f"{name}.lora_A_flat", axis=2)
    shape = surgeon.integers([0, channels, *kernel])  # 0: as it is, even where it is 0
    a = surgeon.op("Reshape", flat, shape, name=f"{name}.lora_A_kernel")
    shared: dict[str, Any] = {}
    for key, attribute in given.product.node.attributes.items():
        if key in _SHARED:
            shared[key] = attribute.value
    return surgeon.op("Conv", given.view.value, a, name=f"{name}.lora_A", **shared)


def _mask_of_own_channels(surgeon: Surgeon, given: BranchInputs, space: list[int]) -> ir.Value:
    """`[batch, rows · rank, 1, ...]`: one where a channel is of the row's own A, else zero. `space`: the axes of 1."""
    a, name = given.a, given.name
    shape = surgeon.op("Shape", given.view.value, name=f"{name}.shape")
    own = number_own_rows(surgeon, shape, a, name)
    sizes = surgeon.op("Shape", a, name=f"{name}.lora_sizes")
    rows = gather_number(surgeon, sizes, 0, f"{name}.all_rows")
    every = surgeon.op("Range", surgeon.integer(0), rows, surgeon.integer(1), name=f"{name}.every_row")
    same = surgeon.op("Equal", own, every, name=f"{name}.is_own")
    assert a.dtype is not None  # an input of ours
    ones = surgeon.op("Cast", same, name=f"{name}.ones", to=a.dtype.value)
    rank = surgeon.op("Gather", sizes, surgeon.integers([2]), name=f"{name}.rank")
    target = surgeon.op("Concat", surgeon.integers([1, 1]), rank, name=f"{name}.by_rank", axis=0)
    wide = surgeon.unsqueeze(ones, [2], name=f"{name}.ones_by_rank")
    spread = surgeon.op("Expand", wide, target, name=f"{name}.ones_of_each")
    flat = surgeon.op("Flatten", spread, name=f"{name}.ones_flat", axis=1)
    return surgeon.unsqueeze(flat, space, name=f"{name}.mask")


CONV_IN_GRAPHS = GraphKind(
    kind=Conv,
    forms={("", "Conv"): _read},
    builder=_ConvBranch(),
    torch_classes=("Conv1d", "Conv2d", "Conv3d"),
    calls="conv[123]d|convolution",
    has_kernel=True,
    takes_norms=True,
    refuse=_refuse,
)
