"""What the manifest says of the places in a graph: points, branches and whole weights, as the contract has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.exporter.locating.located import Occurrence, UnplacedNode
from onnx_lora.exporter.sites.site import Site, WholeWeightSite
from onnx_lora.exporter.writing.weight_files import where
from onnx_lora.heads import OFTEN_TIED
from onnx_lora.manifest import GraphInfo, KnownWeight, Unplaced
from onnx_lora.points import Branch, InjectionPoint, NamedTensor, Quantization, WeightPart, WholeWeight, digest
from onnx_lora.roles import LinearBias, LinearWeight, Parameter, Table

__all__ = [
    "check_agreement",
    "describe_branches",
    "describe_points",
    "describe_tables",
    "describe_unplaced",
    "describe_whole_weight",
]


def describe_branches(sites: Sequence[Site], *, dora: bool) -> tuple[Branch, ...]:
    """One per set of modules that places compute together."""
    branches: dict[Branch, None] = {}
    for site in sites:
        # PEFT has no DoRA on convolutions in groups.
        has_dora = dora and site.products[0].kind.foldable
        branches[Branch(site.modules, has_dora)] = None
    return tuple(branches)


def describe_points(sites: Sequence[Site]) -> tuple[InjectionPoint, ...]:
    """One point per module, over all its nodes."""
    uses: dict[str, list[tuple[Site, Occurrence]]] = {}
    for site in sites:
        for one in site.occurrences:
            uses.setdefault(one.module, []).append((site, one))
    return tuple(_describe_point(module, used) for module, used in uses.items())


def _describe_point(module: str, uses: Sequence[tuple[Site, Occurrence]]) -> InjectionPoint:
    first = uses[0][1]
    kind = first.product.kind
    parts: dict[str | None, WeightPart] = {}
    unproven = ""
    for _, one in uses:
        parts[one.weight.name] = _describe_part(one)
        unproven = unproven or one.unproven
    return InjectionPoint(
        module=module,
        in_features=kind.branch_inputs(first.product.inputs),
        out_features=first.size,
        dtype=first.dtype,
        per_row=all(site.placement.per_row for site, _ in uses),
        sha256=_digest_of(first),
        parts=tuple(parts.values()),
        kind=kind,
        bias=first.has_bias,
        unproven=unproven,
    )


def _digest_of(one: Occurrence) -> str:
    """Of the checkpoint's weight in float32 where the graph's own is rounded, so that every package of one base
    has the same."""
    if one.reference is not None and (one.product.quantized is not None or one.is_piece):
        return digest(one.reference().astype(np.float32, copy=False))
    window = one.window()
    return digest(window if one.in_out else window.T)


def _describe_part(one: Occurrence) -> WeightPart:
    product = one.product
    quantized: Quantization | None = None
    if product.quantized is not None:
        zero = product.quantized.zero_point
        zero_point = None if zero is None else _name(zero.value)
        quantized = Quantization(product.quantized.scheme, _name(product.quantized.scale.value), zero_point)
    weight = _name(one.weight)
    return WeightPart(
        initializer=weight.initializer,
        stored=weight.stored,
        outputs=one.outputs,
        transposed=product.transposed,
        start=one.start,
        first=one.first,
        quantized=quantized,
    )


def _name(initializer: ir.Value) -> NamedTensor:
    assert initializer.name is not None
    return NamedTensor(initializer.name, where(initializer))


def describe_unplaced(nodes: Sequence[UnplacedNode]) -> tuple[Unplaced, ...]:
    """The nodes that get no point, as the manifest lists them."""
    return tuple(Unplaced(node.node, node.reason, node.modules) for node in nodes)


def describe_tables(occurrences: Sequence[Occurrence], chosen: Collection[str]) -> tuple[KnownWeight, ...]:
    """The tables among the modules that are not `chosen`, and the weights there that may be one with any table."""
    table_shapes = {_torch_shape(one) for one in occurrences if one.graph_kind.looks_up}
    tables: dict[str, KnownWeight] = {}
    for one in occurrences:
        may_be_tied = _torch_shape(one) in table_shapes or one.module.rpartition(".")[2] in OFTEN_TIED
        is_exact = one.product.quantized is None and not one.is_piece
        if may_be_tied and is_exact and one.module not in chosen:
            tables[one.module] = KnownWeight(one.module, one.dtype, _digest_of(one))
    return tuple(tables.values())


def _torch_shape(one: Occurrence) -> tuple[int, ...]:
    return one.product.kind.torch_shape(one.in_features, one.size)


def describe_whole_weight(
    weight: WholeWeightSite, heads: Collection[str], pointed: Collection[str], doubt: str
) -> WholeWeight:
    """`heads`: modules whose number of outputs is free; `pointed`: those with a point; `doubt`: why a weight that is no
    linear module's may be another than the model's."""
    assert weight.value.const_value is not None
    stored, values = _name(weight.value), weight.value.const_value.numpy()
    shape = stored.stored.shape
    if weight.is_turned:
        shape, values = shape[::-1], values.T
    part = WeightPart(stored.initializer, stored.stored, outputs=shape[-1] if shape else 1, transposed=weight.is_turned)
    one, site = weight.occurrence, weight.site
    if one is None or site is None:
        is_table = weight.table_reader is not None
        return WholeWeight(
            name=weight.name,
            role=Table() if is_table else Parameter(),
            shape=shape,
            dtype=stored.stored.dtype,
            # Rows behind those that a point's A has would have no delta.
            free_outputs=is_table and weight.name.removesuffix(".weight") not in pointed,
            per_row=False,
            sha256=digest(values),
            parts=(part,),
            unproven=doubt,
        )
    if weight.is_bias:
        return WholeWeight(
            name=weight.name,
            role=LinearBias(),
            shape=shape,
            dtype=one.dtype,
            free_outputs=one.module in heads,
            per_row=site.placement.per_row,
            sha256=digest(values),
            parts=(part,),
            unproven=one.unproven,
        )
    as_torch = values if one.product.transposed != one.in_out else values.T
    return WholeWeight(
        name=weight.name,
        role=LinearWeight(one.in_out),
        shape=tuple(as_torch.shape),
        dtype=one.dtype,
        free_outputs=one.module in heads,
        per_row=site.placement.per_row,
        sha256=digest(as_torch),
        parts=(_describe_part(one),),
        unproven=one.unproven,
    )


def check_agreement(infos: Sequence[GraphInfo], path: Path) -> None:
    """Raises ModelError: two graphs, one of them in the file `path`, mean different weights by one name."""
    known: dict[str, Mapping[str, object]] = {}
    for info in infos:
        for weight in info.replaceable:
            identity = {
                "role": weight.role,
                "shape": weight.shape,
                "dtype": weight.dtype,
                "sha256": weight.sha256,
            }
            if known.setdefault(weight.name, identity) != identity:
                raise ModelError(
                    f"{weight.name} is another weight in another graph; attach the files one by one", path=path
                )
