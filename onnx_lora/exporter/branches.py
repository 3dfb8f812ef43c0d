"""(x · A) · B as nodes, for each kind of module. It knows the axes of x; where the result is added, it does not.

A is `[rows, in, rank]` and B `[rows, rank, out]` for all of them, and rows are 1 or the batch."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.exporter.products import Product
from onnx_lora.exporter.surgery import Surgeon
from onnx_lora.kinds import Conv

__all__ = ["View", "broadcast", "convolved", "looked_up", "multiplied", "scale_of_channels"]

# Attributes of a Conv that PEFT's A shares with the base. It has neither dilation nor groups.
_SHARED = ("auto_pad", "kernel_shape", "pads", "strides")


@dataclass(frozen=True, slots=True)
class View:
    """What a branch reads, the batch first, and the number of axes of what it gives (of a lookup one more than
    of what it reads); `undo` leads back from there: operator and axis."""

    value: ir.Value
    rank: int
    undo: tuple[str, int] | None = None


def broadcast(surgeon: Surgeon, factor: ir.Value, rank: int) -> ir.Value:
    """`[rows, m, n]` so that it meets rows with the first of `rank` axes, not the third last."""
    if rank == 3:
        return factor
    return surgeon.unsqueeze(factor, list(range(1, rank - 2)), name=f"{factor.name}.rows")


def multiplied(surgeon: Surgeon, view: View, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
    """Of a linear module: `[batch, ..., in]` to `[batch, ..., out]`."""
    low = surgeon.op("MatMul", view.value, broadcast(surgeon, a, view.rank), name=f"{name}.lora_A")
    return surgeon.op("MatMul", low, broadcast(surgeon, b, view.rank), name=f"{name}.lora_B")


def looked_up(surgeon: Surgeon, view: View, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
    """Of an embedding: numbers `[batch, ...]` to `[batch, ..., out]`, by rows of A.

    The pair (row of the batch, number) says which; one adapter for all rows has row 0 alone: i mod rows.
    """
    numbers = surgeon.op("Cast", view.value, name=f"{name}.numbers", to=ir.DataType.INT64.value)
    shape = surgeon.op("Shape", numbers, name=f"{name}.shape")
    row = _own_rows(surgeon, shape, a, name)
    if view.rank > 3:
        row = surgeon.unsqueeze(row, list(range(2, view.rank - 1)), name=f"{name}.row_axes")
    row = surgeon.op("Expand", row, shape, name=f"{name}.row_of_each")
    pair = [surgeon.unsqueeze(value, [view.rank - 1], name=f"{name}.{value.name}") for value in (row, numbers)]
    places = surgeon.op("Concat", *pair, name=f"{name}.places", axis=-1)
    low = surgeon.op("GatherND", a, places, name=f"{name}.lora_A")
    return surgeon.op("MatMul", low, broadcast(surgeon, b, view.rank), name=f"{name}.lora_B")


def convolved(
    surgeon: Surgeon, view: View, a: ir.Value, b: ir.Value, name: str, product: Product, *, per_row: bool
) -> ir.Value:
    """Of a convolution: A as a kernel of the base's size, B as a product for each place.

    With rows, A of all rows is applied to each (a convolution cannot choose), and what is another row's is set to
    zero before B.
    """
    conv = product.kind
    assert isinstance(conv, Conv)  # its caller's table
    axes = list(range(2, 2 + len(conv.kernel)))
    channels = conv.factor_shape(conv.branch_inputs(product.inputs))[0]
    by_rank = surgeon.op("Transpose", a, name=f"{name}.lora_A_by_rank", perm=[0, 2, 1])
    flat = surgeon.op("Flatten", by_rank, name=f"{name}.lora_A_flat", axis=2)
    shape = surgeon.integers([0, channels, *conv.kernel])  # 0: as it is, even where it is 0
    kernel = surgeon.op("Reshape", flat, shape, name=f"{name}.lora_A_kernel")
    shared = {key: value.value for key, value in product.node.attributes.items() if key in _SHARED}
    low = surgeon.op("Conv", view.value, kernel, name=f"{name}.lora_A", **shared)
    if per_row:
        low = surgeon.op("Mul", low, _own_channels(surgeon, view, a, axes, name), name=f"{name}.own")
    # Not a Conv: of one with no channels ONNX Runtime leaves what was in the memory; of a MatMul it makes zeros. Nor a
    # Transpose of three axes before it, with which the optimiser makes it a FusedMatMul, that does the same.
    line = len(axes) == 1
    if line:
        low, axes = surgeon.unsqueeze(low, [3], name=f"{name}.plane"), [2, 3]
    last = surgeon.op("Transpose", low, name=f"{name}.channels_last", perm=[0, *axes, 1])
    flat = surgeon.op("Flatten", b, name=f"{name}.lora_B_flat", axis=2)
    total = surgeon.op("MatMul", last, flat, name=f"{name}.lora_B")
    first = surgeon.op("Transpose", total, name=f"{name}.channels_first", perm=[0, axes[-1], *range(1, axes[-1])])
    return surgeon.squeeze(first, [3], name=f"{name}.line") if line else first


def scale_of_channels(surgeon: Surgeon, scale: ir.Value, conv: Conv, name: str) -> ir.Value:
    """`[rows, 1, out]` as `[rows, out, 1, ...]`."""
    turned = surgeon.op("Transpose", scale, name=f"{name}.dora_channels", perm=[0, 2, 1])
    if len(conv.kernel) == 1:
        return turned
    return surgeon.unsqueeze(turned, list(range(3, 2 + len(conv.kernel))), name=f"{name}.dora_space")


def _size(surgeon: Surgeon, value: ir.Value, axis: int, name: str) -> ir.Value:
    """One number of a shape."""
    return surgeon.op("Gather", value, surgeon.integer(axis), name=name)


def _own_rows(surgeon: Surgeon, shape: ir.Value, factor: ir.Value, name: str) -> ir.Value:
    """For each row of the batch, the row of the factor that is its own: `[batch, 1]`."""
    rows = _size(surgeon, surgeon.op("Shape", factor, name=f"{name}.lora_shape"), 0, f"{name}.rows_of_lora")
    count = _size(surgeon, shape, 0, f"{name}.batch")
    each = surgeon.op("Range", surgeon.integer(0), count, surgeon.integer(1), name=f"{name}.range")
    return surgeon.unsqueeze(surgeon.op("Mod", each, rows, name=f"{name}.row"), [1], name=f"{name}.rows")


def _own_channels(surgeon: Surgeon, view: View, a: ir.Value, axes: list[int], name: str) -> ir.Value:
    """`[batch, rows · rank, 1, ...]`: one where a channel is of the row's own A, else zero."""
    own = _own_rows(surgeon, surgeon.op("Shape", view.value, name=f"{name}.shape"), a, name)
    sizes = surgeon.op("Shape", a, name=f"{name}.lora_sizes")
    rows = _size(surgeon, sizes, 0, f"{name}.all_rows")
    every = surgeon.op("Range", surgeon.integer(0), rows, surgeon.integer(1), name=f"{name}.every_row")
    same = surgeon.op("Equal", own, every, name=f"{name}.is_own")
    assert a.dtype is not None  # an input of ours
    ones = surgeon.op("Cast", same, name=f"{name}.ones", to=a.dtype.value)
    rank = surgeon.op("Gather", sizes, surgeon.integers([2]), name=f"{name}.rank")
    target = surgeon.op("Concat", surgeon.integers([1, 1]), rank, name=f"{name}.by_rank", axis=0)
    wide = surgeon.unsqueeze(ones, [2], name=f"{name}.ones_by_rank")
    spread = surgeon.op("Expand", wide, target, name=f"{name}.ones_of_each")
    flat = surgeon.op("Flatten", spread, name=f"{name}.ones_flat", axis=1)
    return surgeon.unsqueeze(flat, axes, name=f"{name}.mask")
