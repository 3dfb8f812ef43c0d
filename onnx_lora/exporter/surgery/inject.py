"""Puts branches into a graph: `y' = (y + (x · lora_A) · lora_B) · dora_scale` beside every product of a chosen module;
and whole weights as inputs in the place of a node's own. It requires located nodes and inferred shapes. It leaves all
other values of the graph as they were.

LoRA (Hu et al. 2021), section 4.1, with the scale in B and both factors transposed; DoRA (Liu et al. 2024),
equation 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.exporter.graph.axes import Shapes
from onnx_lora.exporter.graph.placement import Form
from onnx_lora.exporter.graph.product import Product
from onnx_lora.exporter.graph.values import initializer_behind, only_user
from onnx_lora.exporter.graph_kinds.graph_kind import graph_kind_of
from onnx_lora.exporter.sites.site import Site
from onnx_lora.exporter.surgery.branches import BranchInputs, View, broadcast
from onnx_lora.exporter.surgery.surgeon import Surgeon
from onnx_lora.points import Branch, WholeWeight

__all__ = ["inject"]


@dataclass(frozen=True, slots=True)
class _Addition:
    """What a branch gives, in the axes of its view: its delta and DoRA's scale, each None where a site has none."""

    view: View
    delta: ir.Value | None
    scale: ir.Value | None


@dataclass(frozen=True, slots=True)
class _Change:
    """What is added to one product, in the axes of a view: `label` begins the names of the nodes that do it."""

    product: Product
    view: View
    delta: ir.Value
    scale: ir.Value | None
    label: str


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

    Raises ModelError: with DoRA, a node adds what is no bias.
    """
    surgeon.insert_after(surgeon.first([product.node for product in site.products]))
    view = _make_view(surgeon, site)
    delta = scale = None
    if branch is not None:
        delta = _build_delta(surgeon, site, view, branch, inputs)
        scale = inputs[branch.dora_scale] if branch.dora else None
    if replaced:
        _replace_weight(surgeon, site, _Addition(view, delta, scale), inputs, replaced)
    elif delta is not None and len(site.products) == 1:
        _add(surgeon, _Change(site.products[0], view, delta, scale, site.label), shapes)
    elif delta is not None:
        for change in _cut(surgeon, site, view, delta, scale):
            _add(surgeon, change, shapes)


def _make_view(surgeon: Surgeon, site: Site) -> View:
    """What the branch reads, with the batch as its first axis and at least one more before the features."""
    placement = site.placement
    if placement.flattened_by is not None:
        return _undo_reshape(surgeon, site, placement.flattened_by)
    if placement.rank > 2:
        return View(site.input, placement.rank)
    axis = 1 if placement.form is Form.POOLED else 0
    batched = surgeon.unsqueeze(site.input, [axis], name=f"{site.label}.batched")
    return View(batched, 3, ("Squeeze", axis))


def _undo_reshape(surgeon: Surgeon, site: Site, reshape: ir.Node) -> View:
    """The view of an input whose batch and positions a Reshape merged: what the Reshape read, if that has its
    features and nothing stands between it and the product; else the input with its batch and positions parted again."""
    label = site.label
    source = reshape.inputs[0]
    assert source is not None  # every Reshape reads data
    rank = site.placement.source_rank
    if reshape.outputs[0] is site.input and rank:
        return View(source, rank, ("Flatten", rank - 1))
    shape = surgeon.op("Shape", source, name=f"{label}.shape")
    batch = surgeon.op("Gather", shape, surgeon.integers([0]), name=f"{label}.batch")
    features = surgeon.integers([-1, site.occurrences[0].in_features])
    target = surgeon.op("Concat", batch, features, name=f"{label}.batched_shape", axis=0)
    batched = surgeon.op("Reshape", site.input, target, name=f"{label}.batched")
    return View(batched, 3, ("Flatten", 2))


def _build_delta(surgeon: Surgeon, site: Site, view: View, branch: Branch, inputs: Mapping[str, ir.Value]) -> ir.Value:
    """(x · A) · B, in the view's axes."""
    given = BranchInputs(
        view=view,
        a=inputs[branch.lora_a],
        b=inputs[branch.lora_b],
        product=site.products[0],
        name=branch.name,
        per_row=site.placement.per_row,
    )
    return site.graph_kind.builder.build_delta(surgeon, given)


def _cut(surgeon: Surgeon, site: Site, view: View, delta: ir.Value, scale: ir.Value | None) -> list[_Change]:
    """The pieces of a delta, and of its scale, for products that compute a module together."""
    count = len(site.products)
    sizes = surgeon.integers([product.outputs for product in site.products])
    deltas = surgeon.split(delta, sizes, count, name=f"{site.label}.lora_pieces")
    scales: list[ir.Value | None] = [None] * count
    if scale is not None:
        scales = [*surgeon.split(scale, sizes, count, name=f"{site.label}.dora_pieces")]
    changes: list[_Change] = []
    for product, own_delta, own_scale in zip(site.products, deltas, scales, strict=True):
        label = product.node.name or site.label
        changes.append(_Change(product, view, own_delta, own_scale, label))
    return changes


def _leave_view(surgeon: Surgeon, view: View, value: ir.Value, label: str) -> ir.Value:
    """Bring a value from the view's axes into those of the product."""
    if view.undo is None:
        return value
    operator, axis = view.undo
    if operator == "Flatten":
        return surgeon.op("Flatten", value, name=f"{label}.flat", axis=axis)
    return surgeon.squeeze(value, [axis], name=f"{label}.pooled")


def _enter_view(surgeon: Surgeon, view: View, value: ir.Value, like: ir.Value, label: str) -> ir.Value:
    """Bring a product's output into the view's axes. `like` has their lengths, all but the last one's."""
    if view.undo is None:
        return value
    operator, axis = view.undo
    if operator == "Squeeze":
        return surgeon.unsqueeze(value, [axis], name=f"{label}.unpooled")
    axes = surgeon.op("Shape", like, name=f"{label}.axes")
    return surgeon.op("Reshape", value, axes, name=f"{label}.unflat")


def _add(surgeon: Surgeon, change: _Change, shapes: Shapes) -> None:
    """Add the delta to the product, or behind the Reshape that undoes the one before it, and scale the sum.

    The delta's shape is stated to be the product's. ONNX cannot infer it, because rows are 1 or the batch; and without
    it ONNX Runtime would know no shape from there on, and planning its memory would take time with the square of the
    number of points.
    """
    output = change.product.output
    shapes.state(output)
    maker = output.producer()
    assert maker is not None
    surgeon.insert_after(_later_of(surgeon, maker, change.delta))
    reshape = _find_reshape_back(change, shapes)
    if reshape is not None:
        _add_behind(surgeon, change, reshape, shapes)
    elif change.scale is None:
        delta = _leave_view(surgeon, change.view, change.delta, change.label)
        _state_alike(delta, output)
        total = surgeon.op("Add", output, delta, name=f"{change.label}.lora_add")
        surgeon.replace(output, total, but=total.producer())
    else:
        _add_scaled(surgeon, change, change.scale)


def _find_reshape_back(change: _Change, shapes: Shapes) -> ir.Node | None:
    """The Reshape behind the product that undoes the one before it, where nothing else reads the product."""
    view = change.view
    if view.undo is None or view.undo[0] != "Flatten":
        return None
    reshape = only_user(change.product.output, "Reshape")
    if reshape is None or not shapes.is_like(reshape.outputs[0], view.value, change.product.outputs):
        return None
    return reshape


def _add_behind(surgeon: Surgeon, change: _Change, reshape: ir.Node, shapes: Shapes) -> None:
    """Add and scale behind the Reshape, whose output has the view's axes."""
    reshaped = reshape.outputs[0]
    surgeon.insert_after(_later_of(surgeon, reshape, change.delta))
    shapes.state(reshaped)
    _state_alike(change.delta, reshaped)
    total = surgeon.op("Add", reshaped, change.delta, name=f"{change.label}.lora_add")
    first = total.producer()
    if change.scale is not None:
        total = _scale(surgeon, change, total, change.scale)
    surgeon.replace(reshaped, total, but=first)


def _add_scaled(surgeon: Surgeon, change: _Change, scale: ir.Value) -> None:
    """Add and scale in the view's axes, and go back to the product's."""
    output = change.product.output
    view = change.view
    label = change.label
    users = [(use.node, use.idx) for use in output.uses()]
    entered = _enter_view(surgeon, view, output, change.delta, label)
    total = surgeon.op("Add", entered, change.delta, name=f"{label}.lora_add")
    scaled = _scale(surgeon, change, total, scale)
    total = _leave_view(surgeon, view, scaled, label)
    own = next(use.node for use in output.uses() if (use.node, use.idx) not in users)
    surgeon.replace(output, total, but=own)


def _state_alike(value: ir.Value, like: ir.Value) -> None:
    """Write down that a value has the type and the shape of another."""
    value.type = like.type
    value.shape = like.shape


def _scale(surgeon: Surgeon, change: _Change, total: ir.Value, scale: ir.Value) -> ir.Value:
    """Scale `total`, but not the bias b that the node itself added: `total · scale + b · (1 - scale)`. With a scale of
    1 that is `total`, bit for bit.

    Raises ModelError: the node adds something that is no bias.
    """
    product = change.product
    label = change.label
    builder = graph_kind_of(product).builder
    scale = builder.shape_scale(surgeon, scale, product, change.view.rank, label)
    scaled = surgeon.op("Mul", total, scale, name=f"{label}.dora")
    added = product.added
    if added is None:
        return scaled
    bias = initializer_behind(added) or added
    if bias.shape is None or tuple(bias.shape) not in ((product.outputs,), (1, product.outputs)):
        raise ModelError(
            f"{label}: its node must add a bias to the product or nothing, for DoRA's scale leaves biases out, and it "
            "adds something else; make the package without dora"
        )
    added = builder.shape_bias(surgeon, added, product, label)
    one = surgeon.number(1.0, np.dtype(product.dtype))
    rest = surgeon.op("Sub", one, scale, name=f"{label}.dora_rest")
    kept = surgeon.op("Mul", added, rest, name=f"{label}.bias_rest")
    return surgeon.op("Add", scaled, kept, name=f"{label}.bias_kept")


def _later_of(surgeon: Surgeon, node: ir.Node, value: ir.Value) -> ir.Node:
    """Of `node` and the producer of `value`, the one that stands later in the graph."""
    producer = value.producer()
    assert producer is not None
    return surgeon.later(node, producer)


def _replace_weight(
    surgeon: Surgeon,
    site: Site,
    addition: _Addition,
    inputs: Mapping[str, ir.Value],
    replaced: Mapping[str, WholeWeight],
) -> None:
    """y = x · W (+ delta) (· scale) (+ bias) with W and bias from the inputs, in place of the node's own."""
    (one,) = site.occurrences
    module = one.module
    view = addition.view
    weight = broadcast(surgeon, inputs[f"{module}.weight"], view.rank)
    total = surgeon.op("MatMul", view.value, weight, name=f"{module}.matmul")
    if addition.delta is not None:
        total = surgeon.op("Add", total, addition.delta, name=f"{module}.lora_add")
    if addition.scale is not None:
        scale = broadcast(surgeon, addition.scale, view.rank)
        total = surgeon.op("Mul", total, scale, name=f"{module}.dora")
    last = site.node
    bias = replaced.get(f"{module}.bias")
    if bias is not None and one.bias is not None:
        added = broadcast(surgeon, inputs[bias.name], view.rank)
        total = surgeon.op("Add", total, added, name=f"{module}.bias_add")
        last = one.bias[0]
    total = _leave_view(surgeon, view, total, module)
    constant = one.product.added
    if bias is None and constant is not None:  # a Gemm's C that is no bias
        total = surgeon.op("Add", total, constant, name=f"{module}.constant_add")
    surgeon.replace(last.outputs[0], total)
    surgeon.drop_dead(last)
    if replaced[f"{module}.weight"].free_outputs:
        _loosen(total, f"{module}.outputs")


def _loosen(value: ir.Value, outputs: str) -> None:
    """Let the number of outputs be free, from a head on to the graph's outputs."""
    waiting, seen = [value], {value}
    while waiting:
        one = waiting.pop()
        if one.shape is not None and one.is_graph_output():
            one.shape = ir.Shape([*one.shape[:-1], outputs])
        elif one.shape is not None:
            one.shape = None  # whoever reads the graph infers it again
        for use in one.uses():
            behind = use.node.outputs[0]
            if behind not in seen:
                seen.add(behind)
                waiting.append(behind)
