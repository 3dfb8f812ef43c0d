"""What the manifest says of located modules: points and replaceable weights, as the contract has them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_lora.exporter.axes import Shapes, outputs_are_free
from onnx_lora.exporter.expose import Exposure, outputs_behind
from onnx_lora.exporter.inject import Placement, Site
from onnx_lora.exporter.locate import Linear
from onnx_lora.exporter.weights import where
from onnx_lora.points import InjectionPoint, Replaceable, WeightPart, digest

__all__ = ["free_modules", "points_of", "replaceable_of"]


def points_of(sites: Sequence[Site], shapes: Shapes) -> tuple[InjectionPoint, ...]:
    """One point per module, over all its nodes."""
    nodes: dict[str, list[tuple[Site, Linear]]] = {}
    for site in sites:
        for linear in site.linears:
            nodes.setdefault(linear.module, []).append((site, linear))
    return tuple(_point(module, uses, shapes) for module, uses in nodes.items())


def _point(module: str, uses: Sequence[tuple[Site, Linear]], shapes: Shapes) -> InjectionPoint:
    first = uses[0][1]
    parts = {linear.weight.name: _part(linear) for _, linear in uses}
    window = first.values()[:, first.start : first.start + first.out_features]
    return InjectionPoint(
        module=module,
        in_features=first.in_features,
        out_features=first.out_features,
        dtype=_dtype(first),
        per_row=all(Placement.of(site, shapes).per_row for site, _ in uses),
        sha256=digest(window if first.in_out else window.T),
        parts=tuple(parts.values()),
    )


def _dtype(linear: Linear) -> str:
    """The type the node computes in: behind a Cast another than the weight's."""
    for wrapper in linear.wrappers:
        if wrapper.op_type == "Cast":
            return ir.DataType(wrapper.attributes.get_int("to")).numpy().name
    assert linear.weight.dtype is not None
    return linear.weight.dtype.numpy().name


def _part(linear: Linear) -> WeightPart:
    assert linear.weight.name is not None
    return WeightPart(linear.weight.name, where(linear.weight), linear.transposed, linear.start)


def free_modules(model: ir.Model, exposures: Sequence[Exposure]) -> frozenset[str]:
    """The modules whose number of outputs an adapter may choose: the heads."""
    heads: dict[str, dict[str, int]] = {}
    behind: dict[str, tuple[str, ...]] = {}
    for exposure in exposures:
        if exposure.linear is not None and (outputs := outputs_behind(exposure)):
            module = exposure.linear.module
            axis = 0 if exposure.is_bias or exposure.linear.transposed else 1
            heads.setdefault(module, {})[exposure.value.name or ""] = axis
            behind[module] = outputs
    return frozenset(module for module, weights in heads.items() if outputs_are_free(model, weights, behind[module]))


def replaceable_of(exposure: Exposure, linears: Sequence[Linear], shapes: Shapes, heads: frozenset[str]) -> Replaceable:
    assert exposure.value.name is not None
    assert exposure.value.const_value is not None
    stored = where(exposure.value)
    values = exposure.value.const_value.numpy()
    linear = exposure.linear
    if linear is None:
        part = WeightPart(exposure.value.name, stored)
        return Replaceable(
            exposure.name, "whole", stored.shape, stored.dtype, False, False, digest(values), (part,), in_out=False
        )
    uses = [other for other in linears if other.module == linear.module]
    rows = all(Placement.of(Site((use,)), shapes).per_row for use in uses)
    free = linear.module in heads and len(uses) == 1
    if exposure.is_bias:
        part = WeightPart(exposure.value.name, stored)
        return Replaceable(
            exposure.name, "linear_bias", stored.shape, _dtype(linear), free, rows, digest(values), (part,)
        )
    weight = values if linear.transposed != linear.in_out else values.T
    return Replaceable(
        name=exposure.name,
        role="linear_weight",
        shape=tuple(weight.shape),
        dtype=_dtype(linear),
        free_outputs=free,
        per_row=rows,
        sha256=digest(weight),
        parts=(_part(linear),),
        in_out=linear.in_out,
    )
