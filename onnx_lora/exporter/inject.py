"""The branch: `y' = (y + (x · lora_A) · lora_B) · dora_scale` beside every product of a chosen module, and whole
weights as inputs in place of a node's own. It needs located nodes and inferred shapes; it leaves every
value that it does not name as it was.

LoRA (Hu et al. 2021), section 4.1, with the scale in B and both factors transposed; DoRA (Liu et al. 2024),
equation 5."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.exporter.axes import Form, Shapes
from onnx_lora.exporter.branches import View, broadcast, convolved, looked_up, multiplied, scale_of_channels
from onnx_lora.exporter.products import Product, unwrap
from onnx_lora.exporter.sites import Site
from onnx_lora.exporter.surgery import Surgeon
from onnx_lora.kinds import Conv, Embedding
from onnx_lora.points import Branch, WholeWeight

__all__ = ["inject"]


def inject(
    surgeon: Surgeon,
    site: Site,
    shapes: Shapes,
    inputs: Mapping[str, ir.Value],
    branch: Branch | None,
    replaced: Mapping[str, WholeWeight],
) -> None:
    """Give one place its branch, and its weight and bias as inputs where they are `replaced`.

    `inputs` holds the graph inputs by name; `branch` and `replaced` those that concern this site.
    """
    surgeon.insert_after(surgeon.first([product.node for product in site.products]))
    view = _view(surgeon, site, site.label)
    delta = None if branch is None else _delta(surgeon, site, view, branch, inputs)
    scale = None if branch is None or not branch.dora else inputs[branch.dora_scale]
    if replaced:
        _replace_weight(surgeon, site, view, delta, scale, inputs, replaced)
    elif delta is not None and len(site.products) == 1:
        _add(surgeon, site.products[0], view, delta, scale, shapes, site.label)
    elif delta is not None:
        sizes = surgeon.integers([product.outputs for product in site.products])
        pieces = surgeon.split(delta, sizes, len(site.products), name=f"{site.label}.lora_pieces")
        scales: list[ir.Value | None] = [None] * len(pieces)
        if scale is not None:
            scales = [*surgeon.split(scale, sizes, len(site.products), name=f"{site.label}.dora_pieces")]
        for product, piece, own in zip(site.products, pieces, scales, strict=True):
            _add(surgeon, product, view, piece, own, shapes, product.node.name or site.label)


def _view(surgeon: Surgeon, site: Site, label: str) -> View:
    value, placement, reshape = site.input, site.placement, site.placement.flattened_by
    if reshape is not None:
        source = reshape.inputs[0]
        assert source is not None  # a Reshape's data
        if reshape.outputs[0] is value:
            return View(source, placement.source_rank, ("Flatten", placement.source_rank - 1))
        shape = surgeon.op("Shape", source, name=f"{label}.shape")
        batch = surgeon.op("Gather", shape, surgeon.integers([0]), name=f"{label}.batch")
        features = surgeon.integers([-1, site.linears[0].in_features])
        target = surgeon.op("Concat", batch, features, name=f"{label}.batched_shape", axis=0)
        return View(surgeon.op("Reshape", value, target, name=f"{label}.batched"), 3, ("Flatten", 2))
    if placement.rank > 2:
        return View(value, placement.rank)
    axis = 1 if placement.form is Form.POOLED else 0
    return View(surgeon.unsqueeze(value, [axis], name=f"{label}.batched"), 3, ("Squeeze", axis))


def _delta(surgeon: Surgeon, site: Site, view: View, branch: Branch, inputs: Mapping[str, ir.Value]) -> ir.Value:
    """(x · A) · B, in the view's axes."""
    a, b, product = inputs[branch.lora_a], inputs[branch.lora_b], site.products[0]
    if isinstance(product.kind, Embedding):
        return looked_up(surgeon, view, a, b, branch.name)
    if isinstance(product.kind, Conv):
        return convolved(surgeon, view, a, b, branch.name, product, per_row=site.placement.per_row)
    return multiplied(surgeon, view, a, b, branch.name)


def _undo(surgeon: Surgeon, view: View, value: ir.Value, label: str) -> ir.Value:
    if view.undo is None:
        return value
    kind, axis = view.undo
    if kind == "Flatten":
        return surgeon.op("Flatten", value, name=f"{label}.flat", axis=axis)
    return surgeon.squeeze(value, [axis], name=f"{label}.pooled")


def _redo(surgeon: Surgeon, view: View, value: ir.Value, like: ir.Value, label: str) -> ir.Value:
    """The product in the view's axes; `like` has them, but for the last one's length."""
    if view.undo is None:
        return value
    kind, axis = view.undo
    if kind == "Squeeze":
        return surgeon.unsqueeze(value, [axis], name=f"{label}.unpooled")
    return surgeon.op("Reshape", value, surgeon.op("Shape", like, name=f"{label}.axes"), name=f"{label}.unflat")


def _add(
    surgeon: Surgeon,
    product: Product,
    view: View,
    delta: ir.Value,
    scale: ir.Value | None,
    shapes: Shapes,
    label: str,
) -> None:
    """Add the delta to the product, or behind the Reshape that undoes the one before it, and scale the sum.

    The delta's shape is stated to be the product's. ONNX infers none, with rows of one or of the batch, and from
    there on ONNX Runtime's plan of memory would know no shape either, and take the square of the points' number.
    """
    output = product.output
    shapes.state(output)
    maker = output.producer()
    assert maker is not None
    surgeon.insert_after(_later(surgeon, maker, delta))
    uses = list(output.uses())
    if view.undo is not None and view.undo[0] == "Flatten" and len(uses) == 1 and not output.is_graph_output():
        reshaped = uses[0].node.outputs[0]
        if uses[0].node.op_type == "Reshape" and shapes.is_like(reshaped, view.value, product.outputs):
            surgeon.insert_after(_later(surgeon, uses[0].node, delta))
            shapes.state(reshaped)
            _state(delta, reshaped)
            total = surgeon.op("Add", reshaped, delta, name=f"{label}.lora_add")
            first = total.producer()
            if scale is not None:
                total = _scaled(surgeon, product, view, total, scale, label)
            surgeon.replace(reshaped, total, but=first)
            return
    if scale is None:
        delta = _undo(surgeon, view, delta, label)
        _state(delta, output)
        total = surgeon.op("Add", output, delta, name=f"{label}.lora_add")
        surgeon.replace(output, total, but=total.producer())
        return
    users = [(use.node, use.idx) for use in output.uses()]
    total = surgeon.op("Add", _redo(surgeon, view, output, delta, label), delta, name=f"{label}.lora_add")
    total = _undo(surgeon, view, _scaled(surgeon, product, view, total, scale, label), label)
    own = next(use.node for use in output.uses() if (use.node, use.idx) not in users)
    surgeon.replace(output, total, but=own)


def _state(value: ir.Value, like: ir.Value) -> None:
    value.type, value.shape = like.type, like.shape


def _scaled(surgeon: Surgeon, product: Product, view: View, total: ir.Value, scale: ir.Value, label: str) -> ir.Value:
    """`total · scale`, what the node itself added to the product (b) left as it is: `· scale + b · (1 - scale)`. With a
    scale of 1 that is `total`, bit for bit."""
    if isinstance(product.kind, Conv):
        scale = scale_of_channels(surgeon, scale, product.kind, label)
    else:
        scale = broadcast(surgeon, scale, view.rank)
    scaled = surgeon.op("Mul", total, scale, name=f"{label}.dora")
    added = product.added
    if added is None:
        return scaled
    bias = unwrap(added)[0] or added
    if bias.shape is None or tuple(bias.shape) not in ((product.outputs,), (1, product.outputs)):
        raise ModelError(
            f"{label}: its node adds what is no bias to the product, which DoRA's scale must leave out; "
            "make the package without dora"
        )
    if isinstance(product.kind, Conv):
        added = surgeon.unsqueeze(added, list(range(1, 1 + len(product.kind.kernel))), name=f"{label}.bias_channels")
    one = surgeon.number(1.0, np.dtype(product.dtype))
    rest = surgeon.op("Sub", one, scale, name=f"{label}.dora_rest")
    kept = surgeon.op("Mul", added, rest, name=f"{label}.bias_rest")
    return surgeon.op("Add", scaled, kept, name=f"{label}.bias_kept")


def _later(surgeon: Surgeon, node: ir.Node, value: ir.Value) -> ir.Node:
    """Of `node` and the producer of `value`, the one that stands later in the graph."""
    producer = value.producer()
    assert producer is not None
    return surgeon.later(node, producer)


def _replace_weight(
    surgeon: Surgeon,
    site: Site,
    view: View,
    delta: ir.Value | None,
    scale: ir.Value | None,
    inputs: Mapping[str, ir.Value],
    replaced: Mapping[str, WholeWeight],
) -> None:
    """y = x · W (+ delta) (· scale) (+ bias) with W and bias from the inputs, in place of the node's own."""
    (linear,) = site.linears
    weight = broadcast(surgeon, inputs[f"{linear.module}.weight"], view.rank)
    total = surgeon.op("MatMul", view.value, weight, name=f"{linear.module}.matmul")
    if delta is not None:
        total = surgeon.op("Add", total, delta, name=f"{linear.module}.lora_add")
    if scale is not None:
        total = surgeon.op("Mul", total, broadcast(surgeon, scale, view.rank), name=f"{linear.module}.dora")
    last = site.node
    bias = replaced.get(f"{linear.module}.bias")
    if bias is not None and linear.bias is not None:
        total = surgeon.op(
            "Add", total, broadcast(surgeon, inputs[bias.name], view.rank), name=f"{linear.module}.bias_add"
        )
        last = linear.bias[0]
    total = _undo(surgeon, view, total, linear.module)
    constant = site.node.inputs[2] if site.node.op_type == "Gemm" and len(site.node.inputs) > 2 else None
    if constant is not None and last is site.node and bias is None:
        total = surgeon.op("Add", total, constant, name=f"{linear.module}.constant_add")  # a Gemm's C that is no bias
    surgeon.replace(last.outputs[0], total)
    surgeon.drop_dead(last)
    if replaced[f"{linear.module}.weight"].free_outputs:
        _loosen(total, f"{linear.module}.outputs")


def _loosen(value: ir.Value, outputs: str) -> None:
    """Let the number of outputs be free, from a head on to the graph's outputs."""
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape[:-1], outputs]) if value.is_graph_output() else None
    for use in value.uses():
        _loosen(use.node.outputs[0], outputs)
