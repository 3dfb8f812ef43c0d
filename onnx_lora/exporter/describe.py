"""What the manifest says of sites and exposures: points and replaceable weights, as the contract has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.axes import outputs_are_free
from onnx_lora.exporter.located import Occurrence
from onnx_lora.exporter.sites import Site
from onnx_lora.exporter.weights import where
from onnx_lora.exporter.whole_weights import Exposure, outputs_behind
from onnx_lora.points import Branch, InjectionPoint, NamedTensor, Quantization, WeightPart, WholeWeight, digest
from onnx_lora.roles import LinearBias, LinearWeight, Parameter, Table

__all__ = ["branches_of", "free_modules", "points_of", "replaceable_of"]


def branches_of(sites: Sequence[Site], *, dora: bool) -> tuple[Branch, ...]:
    """One per set of modules that places compute together."""
    # PEFT has no DoRA on convolutions in groups.
    return tuple(dict.fromkeys(Branch(site.modules, dora and site.products[0].kind.foldable) for site in sites))


def points_of(sites: Sequence[Site]) -> tuple[InjectionPoint, ...]:
    """One point per module, over all its nodes."""
    uses: dict[str, list[tuple[Site, Occurrence]]] = {}
    for site in sites:
        for linear in site.linears:
            uses.setdefault(linear.module, []).append((site, linear))
    return tuple(_point(module, used) for module, used in uses.items())


def _point(module: str, uses: Sequence[tuple[Site, Occurrence]]) -> InjectionPoint:
    first = uses[0][1]
    product = first.product
    return InjectionPoint(
        module=module,
        in_features=product.kind.branch_inputs(product.inputs),
        out_features=first.size,
        dtype=first.dtype,
        per_row=all(site.placement.per_row for site, _ in uses),
        sha256=_digest(first),
        parts=tuple({linear.weight.name: _part(linear) for _, linear in uses}.values()),
        kind=product.kind,
        bias=first.has_bias,
        unproven=next((linear.unproven for _, linear in uses if linear.unproven), ""),
    )


def _digest(linear: Occurrence) -> str:
    """Of the checkpoint's weight in float32 where the graph's own is rounded, so that every package of one base
    has the same."""
    if linear.reference is not None and (linear.product.quantized is not None or linear.outputs < linear.size):
        return digest(linear.reference().astype(np.float32, copy=False))
    window = linear.window()
    return digest(window if linear.in_out else window.T)


def _part(linear: Occurrence) -> WeightPart:
    product = linear.product
    quantized: Quantization | None = None
    if product.quantized is not None:
        zero = product.quantized.zero_point
        zero_point = None if zero is None else _named(zero.value)
        quantized = Quantization(product.quantized.scheme, _named(product.quantized.scale.value), zero_point)
    weight = _named(linear.weight)
    return WeightPart(
        initializer=weight.initializer,
        stored=weight.stored,
        outputs=linear.outputs,
        transposed=product.transposed,
        start=linear.start,
        first=linear.first,
        quantized=quantized,
    )


def _named(value: ir.Value) -> NamedTensor:
    assert value.name is not None
    return NamedTensor(value.name, where(value))


def free_modules(model: ir.Model, exposures: Sequence[Exposure]) -> frozenset[str]:
    """The modules whose number of outputs an adapter may choose: the heads."""
    heads: dict[str, dict[str, int]] = {}
    behind: dict[str, tuple[str, ...]] = {}
    for exposure in exposures:
        if exposure.linear is not None and (outputs := outputs_behind(exposure)):
            module = exposure.linear.module
            axis = 0 if exposure.is_bias or exposure.linear.product.transposed else 1
            heads.setdefault(module, {})[exposure.value.name or ""] = axis
            behind[module] = outputs
    return frozenset(module for module, weights in heads.items() if outputs_are_free(model, weights, behind[module]))


def replaceable_of(exposure: Exposure, heads: frozenset[str], pointed: Collection[str], doubt: str) -> WholeWeight:
    """`heads`: modules whose number of outputs is free; `pointed`: those with a point; `doubt`: why a weight that is no
    linear module's may be another than the model's."""
    assert exposure.value.name is not None
    assert exposure.value.const_value is not None
    stored = where(exposure.value)
    values = exposure.value.const_value.numpy()
    linear, site = exposure.linear, exposure.site
    part = WeightPart(exposure.value.name, stored, outputs=stored.shape[-1] if stored.shape else 1)
    if linear is None or site is None:
        table = exposure.user is not None and exposure.user.op_type == "Gather" and len(stored.shape) == 2
        # Rows behind those that a point's A has would have no delta.
        free = table and exposure.name.removesuffix(".weight") not in pointed
        return WholeWeight(
            name=exposure.name,
            role=Table() if table else Parameter(),
            shape=stored.shape,
            dtype=stored.dtype,
            free_outputs=free,
            per_row=False,
            sha256=digest(values),
            parts=(part,),
            unproven=doubt,
        )
    rows, free = site.placement.per_row, linear.module in heads
    if exposure.is_bias:
        return WholeWeight(
            name=exposure.name,
            role=LinearBias(),
            shape=stored.shape,
            dtype=linear.dtype,
            free_outputs=free,
            per_row=rows,
            sha256=digest(values),
            parts=(part,),
            unproven=linear.unproven,
        )
    weight = values if linear.product.transposed != linear.in_out else values.T
    return WholeWeight(
        name=exposure.name,
        role=LinearWeight(linear.in_out),
        shape=tuple(weight.shape),
        dtype=linear.dtype,
        free_outputs=free,
        per_row=rows,
        sha256=digest(weight),
        parts=(_part(linear),),
        unproven=linear.unproven,
    )
