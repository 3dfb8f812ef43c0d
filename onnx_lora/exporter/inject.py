"""The branch: `y' = y + (x · lora_A) · lora_B` beside every product of a chosen module, and whole weights
as inputs in place of a node's own. It needs located nodes and inferred shapes; it leaves every
value that it does not name as it was.

LoRA (Hu et al. 2021), section 4.1, with the scale in B and both factors transposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.exporter.axes import Form, Shapes
from onnx_lora.exporter.products import Product
from onnx_lora.exporter.sites import Site
from onnx_lora.exporter.surgery import Surgeon
from onnx_lora.points import Branch, Replaceable

__all__ = ["inject"]


@dataclass(frozen=True, slots=True)
class _View:
    """The node's input with the batch first and its number of axes, and how to get back from it."""

    value: ir.Value
    rank: int
    undo: tuple[str, int] | None  # operator and axis


def inject(
    surgeon: Surgeon,
    site: Site,
    shapes: Shapes,
    inputs: Mapping[str, ir.Value],
    branch: Branch | None,
    replaced: Mapping[str, Replaceable],
) -> None:
    """Give one place its branch, and its weight and bias as inputs where they are `replaced`.

    `inputs` holds the graph inputs by name; `branch` and `replaced` those that concern this site.
    """
    surgeon.insert_after(surgeon.first([product.node for product in site.products]))
    view = _view(surgeon, site, site.label)
    delta = None if branch is None else _delta(surgeon, view, branch, inputs)
    if replaced:
        _replace_weight(surgeon, site, view, delta, inputs, replaced)
    elif delta is not None and len(site.products) == 1:
        _add(surgeon, site.products[0], view, delta, shapes, site.label)
    elif delta is not None:
        sizes = surgeon.integers([product.outputs for product in site.products])
        pieces = surgeon.split(delta, sizes, len(site.products), name=f"{site.label}.lora_pieces")
        for product, piece in zip(site.products, pieces, strict=True):
            _add(surgeon, product, view, piece, shapes, product.node.name or site.label)


def _view(surgeon: Surgeon, site: Site, label: str) -> _View:
    value, placement, reshape = site.input, site.placement, site.placement.flattened_by
    if reshape is not None:
        source = reshape.inputs[0]
        assert source is not None  # a Reshape's data
        if reshape.outputs[0] is value:
            return _View(source, placement.source_rank, ("Flatten", placement.source_rank - 1))
        shape = surgeon.op("Shape", source, name=f"{label}.shape")
        batch = surgeon.op("Gather", shape, surgeon.integers([0]), name=f"{label}.batch")
        features = surgeon.integers([-1, site.linears[0].in_features])
        target = surgeon.op("Concat", batch, features, name=f"{label}.batched_shape", axis=0)
        return _View(surgeon.op("Reshape", value, target, name=f"{label}.batched"), 3, ("Flatten", 2))
    if placement.rank > 2:
        return _View(value, placement.rank, None)
    axis = 1 if placement.form is Form.POOLED else 0
    return _View(surgeon.unsqueeze(value, [axis], name=f"{label}.batched"), 3, ("Squeeze", axis))


def _delta(surgeon: Surgeon, view: _View, branch: Branch, inputs: Mapping[str, ir.Value]) -> ir.Value:
    """(x · A) · B, in the view's axes."""
    a, b = (_broadcast(surgeon, inputs[name], view.rank) for name in (branch.lora_a, branch.lora_b))
    low = surgeon.op("MatMul", view.value, a, name=f"{branch.name}.lora_A")
    return surgeon.op("MatMul", low, b, name=f"{branch.name}.lora_B")


def _broadcast(surgeon: Surgeon, factor: ir.Value, rank: int) -> ir.Value:
    """`[rows, m, n]` so that MatMul meets rows with the first of `rank` axes, not the third last."""
    if rank == 3:
        return factor
    return surgeon.unsqueeze(factor, list(range(1, rank - 2)), name=f"{factor.name}.rows")


def _undo(surgeon: Surgeon, view: _View, value: ir.Value, label: str) -> ir.Value:
    if view.undo is None:
        return value
    kind, axis = view.undo
    if kind == "Flatten":
        return surgeon.op("Flatten", value, name=f"{label}.flat", axis=axis)
    return surgeon.squeeze(value, [axis], name=f"{label}.pooled")


def _add(surgeon: Surgeon, product: Product, view: _View, delta: ir.Value, shapes: Shapes, label: str) -> None:
    """Add the delta to the product, or behind the Reshape that undoes the one before it."""
    output = product.output
    maker = output.producer()
    assert maker is not None
    surgeon.insert_after(_later(surgeon, maker, delta))
    uses = list(output.uses())
    if view.undo is not None and view.undo[0] == "Flatten" and len(uses) == 1 and not output.is_graph_output():
        reshaped = uses[0].node.outputs[0]
        if uses[0].node.op_type == "Reshape" and shapes.is_like(reshaped, view.value, product.outputs):
            surgeon.insert_after(_later(surgeon, uses[0].node, delta))
            total = surgeon.op("Add", reshaped, delta, name=f"{label}.lora_add")
            surgeon.replace(reshaped, total, but=total.producer())
            return
    total = surgeon.op("Add", output, _undo(surgeon, view, delta, label), name=f"{label}.lora_add")
    surgeon.replace(output, total, but=total.producer())


def _later(surgeon: Surgeon, node: ir.Node, value: ir.Value) -> ir.Node:
    """Of `node` and the producer of `value`, the one that stands later in the graph."""
    producer = value.producer()
    assert producer is not None
    for candidate in reversed(surgeon.graph):
        if candidate is node or candidate is producer:
            return candidate
    return node


def _replace_weight(
    surgeon: Surgeon,
    site: Site,
    view: _View,
    delta: ir.Value | None,
    inputs: Mapping[str, ir.Value],
    replaced: Mapping[str, Replaceable],
) -> None:
    """y = x · W (+ delta) (+ bias) with W and bias from the inputs, in place of the node's own."""
    (linear,) = site.linears
    weight = _broadcast(surgeon, inputs[f"{linear.module}.weight"], view.rank)
    total = surgeon.op("MatMul", view.value, weight, name=f"{linear.module}.matmul")
    if delta is not None:
        total = surgeon.op("Add", total, delta, name=f"{linear.module}.lora_add")
    last = site.node
    bias = replaced.get(f"{linear.module}.bias")
    if bias is not None and linear.bias is not None:
        total = surgeon.op(
            "Add", total, _broadcast(surgeon, inputs[bias.name], view.rank), name=f"{linear.module}.bias_add"
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
