"""The nodes of every module, over all graphs of a package. One rule: a module gets its point at all of its
nodes, or at none, and a node for all of its modules, or for none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.exporter.axes import Form, Shapes
from onnx_lora.exporter.locate import Linear, Located, Stray, label_of, same_weight

__all__ = ["Placement", "Site", "Sites", "settle"]


@dataclass(frozen=True, slots=True)
class Placement:
    """How the batch lies in a site's input. Found before the first branch goes in: the shapes of values
    that branches add are not known."""

    form: Form
    rank: int
    flattened_by: ir.Node | None = None  # for Form.FLATTENED: the Reshape
    source_rank: int = 0  # the number of axes of that Reshape's input

    @staticmethod
    def of(node: ir.Node, shapes: Shapes) -> Placement | None:
        """None: the number of axes is unknown, or less than two."""
        value = node.inputs[0]
        assert value is not None  # a product has factors
        rank = 2 if node.op_type == "Gemm" else shapes.rank(value)
        if rank is None or rank < 2:
            return None
        form = shapes.form(value)
        reshape = shapes.flattened_by(value) if form is Form.FLATTENED else None
        source_rank = None if reshape is None or reshape.inputs[0] is None else shapes.rank(reshape.inputs[0])
        return Placement(form, rank, reshape, source_rank or 0)

    @property
    def per_row(self) -> bool:
        """Whether a different adapter for every row of the batch is possible here."""
        return self.form is not Form.OTHER


@dataclass(frozen=True, slots=True)
class Site:
    """One node and the modules it computes, side by side in the order of their outputs."""

    linears: tuple[Linear, ...]
    placement: Placement

    @property
    def node(self) -> ir.Node:
        return self.linears[0].node

    @property
    def input(self) -> ir.Value:
        return self.linears[0].input

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(linear.module for linear in self.linears)


@dataclass(frozen=True, slots=True)
class Sites:
    """What one graph offers: nodes that can get a branch, and those that cannot, with the reason."""

    sites: tuple[Site, ...]
    strays: tuple[Stray, ...]

    @staticmethod
    def of(located: Located, shapes: Shapes) -> Sites:
        by_node: dict[ir.Node, list[Linear]] = {}
        for linear in located.linears:
            by_node.setdefault(linear.node, []).append(linear)
        sites: list[Site] = []
        strays = list(located.strays)
        for node, linears in by_node.items():
            ordered = tuple(sorted(linears, key=lambda linear: linear.start))
            placement = Placement.of(node, shapes)
            if placement is None:
                reason = "its input must have at least two axes, and how many it has cannot be told"
                strays.append(Stray(label_of(node), reason, tuple(linear.module for linear in ordered)))
            else:
                sites.append(Site(ordered, placement))
        return Sites(tuple(sites), tuple(strays))


def settle(graphs: Sequence[Sites]) -> list[Sites]:
    """Take out every module that cannot have its point at all of its nodes, and what is computed with it."""
    lost = _unlike(graphs)
    for graph in graphs:
        for stray in graph.strays:
            for module in stray.modules:
                lost.setdefault(module, f"its node {stray.node} can have none: {stray.reason}")
    changed = True
    while changed:
        changed = False
        for site in (site for graph in graphs for site in graph.sites):
            why = next((module for module in site.modules if module in lost), None)
            rest = [module for module in site.modules if module not in lost] if why is not None else []
            lost.update((module, f"it is computed together with {why}, and that can have none") for module in rest)
            changed |= bool(rest)
    return [_without(graph, lost) for graph in graphs]


def _unlike(graphs: Sequence[Sites]) -> dict[str, str]:
    """Modules that are not the same at all of their nodes: a name shared by accident."""
    first: dict[str, Linear] = {}
    lost: dict[str, str] = {}
    for linear in (linear for graph in graphs for site in graph.sites for linear in site.linears):
        known = first.setdefault(linear.module, linear)
        if linear.dtype != known.dtype or not same_weight(known, linear):
            lost[linear.module] = "its nodes hold different weights"
    return lost


def _without(graph: Sites, lost: dict[str, str]) -> Sites:
    strays = list(graph.strays)
    for site in graph.sites:
        gone = [module for module in site.modules if module in lost]
        strays.extend(Stray(label_of(site.node), f"{module}: {lost[module]}", (module,)) for module in gone)
    return Sites(
        tuple(site for site in graph.sites if not any(module in lost for module in site.modules)), tuple(strays)
    )
