"""Finds the places of every module, over all graphs of a package. One rule holds: a module gets its point at all of its
nodes or at none, and a node gets points for all of its modules or for none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnx_lora.exporter.graph.axes import Shapes
from onnx_lora.exporter.graph.placement import Form, Placement
from onnx_lora.exporter.graph.product import Product
from onnx_lora.exporter.graph_kinds.graph_kind import graph_kind_of
from onnx_lora.exporter.locating.located import Located, Occurrence, UnplacedNode, have_same_weight, label_of
from onnx_lora.exporter.sites.site import Site, Sites

__all__ = ["find_sites", "settle"]


def find_sites(located: Located, shapes: Shapes) -> Sites:
    """Group what was located into places: the modules that one node computes, and the nodes that compute one module
    piece by piece."""
    complete, incomplete = _group(located.occurrences)
    sites: list[Site] = []
    unplaced = [*located.unplaced, *incomplete]
    for occurrences in complete:
        placement = _place(occurrences[0].product, shapes)
        if placement is not None:
            sites.append(Site(tuple(occurrences), placement))
            continue
        reason = "its input must have at least two axes, and how many it has cannot be told"
        modules = tuple(one.module for one in occurrences)
        for one in occurrences:
            unplaced.append(UnplacedNode(label_of(one.node), reason, modules))
    return Sites(tuple(sites), tuple(unplaced))


def _place(product: Product, shapes: Shapes) -> Placement | None:
    """How the batch lies in what a product reads. None: the number of axes is unknown, or less than two."""
    # Of a lookup the output has the axes that count: the rows' numbers, and the features behind them.
    value = product.output if graph_kind_of(product).looks_up else product.source
    rank = 2 if product.node.op_type == "Gemm" else shapes.rank(value)
    if rank is None or rank < 2:
        return None
    form = shapes.form(value)
    if form is not Form.FLATTENED:
        return Placement(form, rank)
    reshape = shapes.flattened_by(value)
    source = None if reshape is None else reshape.inputs[0]
    if source is None or shapes.features(source) != shapes.features(value):
        return Placement(form, rank, reshape)
    return Placement(form, rank, reshape, shapes.rank(source) or 0)


def _group(occurrences: Sequence[Occurrence]) -> tuple[list[list[Occurrence]], list[UnplacedNode]]:
    """What belongs to one place, place by place; and the nodes of modules of which pieces are missing."""
    by_node: dict[ir.Node, list[Occurrence]] = {}
    for one in occurrences:
        by_node.setdefault(one.node, []).append(one)
    places: dict[object, list[Occurrence]] = {}
    for node, own in by_node.items():
        key: object = node
        if any(one.is_piece for one in own):
            key = own[0].module, own[0].product.source
        places.setdefault(key, []).extend(own)
    complete: list[list[Occurrence]] = []
    incomplete: list[UnplacedNode] = []
    for found in places.values():
        found.sort(key=lambda one: (one.start, one.first))
        if _is_complete(found):
            complete.append(found)
            continue
        reason = f"it computes some outputs of {found[0].module}; the others are not computed from the same input"
        for one in found:
            incomplete.append(UnplacedNode(label_of(one.node), reason, (one.module,)))
    return complete, incomplete


def _is_complete(found: Sequence[Occurrence]) -> bool:
    """Whether the sorted pieces of a module follow each other from its first output to its last, or there are none."""
    pieces = [one for one in found if one.is_piece]
    end = 0
    for piece in pieces:
        if piece.first != end:
            return False
        end = piece.first + piece.outputs
    return not pieces or end == found[0].size


def settle(graphs: Sequence[Sites]) -> list[Sites]:
    """Take out every module that cannot have its point at all of its nodes, and the modules computed with it."""
    lost = _find_unlike(graphs)
    for graph in graphs:
        for node in graph.unplaced:
            for module in node.modules:
                lost.setdefault(module, f"its node {node.node} can have none: {node.reason}")
    _lose_neighbours(lost, graphs)
    return [_without(graph, lost) for graph in graphs]


def _lose_neighbours(lost: dict[str, str], graphs: Sequence[Sites]) -> None:
    """Add to `lost` the modules that some node computes together with a lost one, and those together with them."""
    together: dict[str, list[Site]] = {}
    for graph in graphs:
        for site in graph.sites:
            if len(site.modules) == 1:
                continue
            for module in site.modules:
                together.setdefault(module, []).append(site)
    waiting = list(lost)
    while waiting:
        gone = waiting.pop()
        for site in together.get(gone, ()):
            for module in site.modules:
                if module not in lost:
                    lost[module] = f"it is computed together with {gone}, and that can have none"
                    waiting.append(module)


def _find_unlike(graphs: Sequence[Sites]) -> dict[str, str]:
    """Modules that do not have the same weight at all of their nodes, which share the name by accident; and why."""
    first: dict[tuple[str, int], Occurrence] = {}
    lost: dict[str, str] = {}
    for graph in graphs:
        for one in graph.occurrences:
            known = first.setdefault((one.module, one.first), one)
            if one.dtype != known.dtype or not have_same_weight(known, one):
                lost[one.module] = "its nodes hold different weights"
    return lost


def _without(graph: Sites, lost: Mapping[str, str]) -> Sites:
    """The same without the places of lost modules. `lost`: why, by module."""
    kept: list[Site] = []
    unplaced = list(graph.unplaced)
    for site in graph.sites:
        gone = [module for module in site.modules if module in lost]
        if not gone:
            kept.append(site)
        for module in gone:
            unplaced.append(UnplacedNode(label_of(site.node), f"{module}: {lost[module]}", (module,)))
    return Sites(tuple(kept), tuple(unplaced))
