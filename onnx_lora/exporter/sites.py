"""The nodes of every module, over all graphs of a package. One rule: a module gets its point at all of its
nodes, or at none, and a node for all of its modules, or for none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.exporter.axes import Form, Shapes
from onnx_lora.exporter.located import Located, Occurrence, Stray, label_of, same_weight
from onnx_lora.exporter.products import Product
from onnx_lora.kinds import Embedding

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
    def of(product: Product, shapes: Shapes) -> Placement | None:
        """None: the number of axes is unknown, or less than two."""
        # Of a lookup the output has the axes that count: the rows' numbers, and the features behind them.
        value = product.output if isinstance(product.kind, Embedding) else product.source
        rank = 2 if product.node.op_type == "Gemm" else shapes.rank(value)
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
    """A place in a graph: products of one activation, and the modules they compute. Side by side, the products'
    outputs are the modules' outputs: one product with one module, or with several (packed), or several with one
    (cut up)."""

    linears: tuple[Occurrence, ...]
    placement: Placement

    @property
    def node(self) -> ir.Node:
        """The first product's."""
        return self.linears[0].node

    @property
    def products(self) -> tuple[Product, ...]:
        by_node = {linear.node: linear.product for linear in self.linears}
        return tuple(by_node.values())

    @property
    def input(self) -> ir.Value:
        return self.linears[0].product.source

    @property
    def label(self) -> str:
        """What new nodes are called after."""
        return self.modules[0] if len(self.modules) == 1 else self.node.name or self.modules[0]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(linear.module for linear in self.linears))


@dataclass(frozen=True, slots=True)
class Sites:
    """What one graph offers: places that can get a branch, and nodes that cannot, with the reason."""

    sites: tuple[Site, ...]
    strays: tuple[Stray, ...]

    @staticmethod
    def of(located: Located, shapes: Shapes) -> Sites:
        sites: list[Site] = []
        strays = list(located.strays)
        places, cut = _places(located.linears)
        strays += cut
        for linears in places:
            placement = Placement.of(linears[0].product, shapes)
            if placement is None:
                reason = "its input must have at least two axes, and how many it has cannot be told"
                modules = tuple(linear.module for linear in linears)
                strays += [Stray(label_of(linear.node), reason, modules) for linear in linears]
            else:
                sites.append(Site(tuple(linears), placement))
        return Sites(tuple(sites), tuple(strays))


def _places(linears: Sequence[Occurrence]) -> tuple[list[list[Occurrence]], list[Stray]]:
    """Linears of one node together, and pieces of one module together; strays where pieces are missing."""
    by_node: dict[ir.Node, list[Occurrence]] = {}
    for linear in linears:
        by_node.setdefault(linear.node, []).append(linear)
    places: dict[object, list[Occurrence]] = {}
    for node, own in by_node.items():
        cut = any(linear.outputs < linear.size for linear in own)
        places.setdefault((own[0].module, own[0].product.source) if cut else node, []).extend(own)
    complete: list[list[Occurrence]] = []
    strays: list[Stray] = []
    for found in places.values():
        found.sort(key=lambda linear: (linear.start, linear.first))
        pieces = [(linear.first, linear.first + linear.outputs) for linear in found if linear.outputs < linear.size]
        if [0, *(end for _, end in pieces)] == [*(begin for begin, _ in pieces), found[0].size] or not pieces:
            complete.append(found)
        else:
            reason = f"it computes some outputs of {found[0].module}; the others are not computed from the same input"
            strays += [Stray(label_of(linear.node), reason, (linear.module,)) for linear in found]
    return complete, strays


def settle(graphs: Sequence[Sites]) -> list[Sites]:
    """Take out every module that cannot have its point at all of its nodes, and what is computed with it."""
    lost = _unlike(graphs)
    for graph in graphs:
        for stray in graph.strays:
            for module in stray.modules:
                lost.setdefault(module, f"its node {stray.node} can have none: {stray.reason}")
    together: dict[str, list[Site]] = {}
    for site in (site for graph in graphs for site in graph.sites):
        for module in site.modules if len(site.modules) > 1 else ():
            together.setdefault(module, []).append(site)
    waiting = list(lost)
    while waiting:
        why = waiting.pop()
        for site in together.get(why, ()):
            rest = [module for module in site.modules if module not in lost]
            lost.update((module, f"it is computed together with {why}, and that can have none") for module in rest)
            waiting += rest
    return [_without(graph, lost) for graph in graphs]


def _unlike(graphs: Sequence[Sites]) -> dict[str, str]:
    """Modules that are not the same at all of their nodes: a name shared by accident."""
    first: dict[tuple[str, int], Occurrence] = {}
    lost: dict[str, str] = {}
    for linear in (linear for graph in graphs for site in graph.sites for linear in site.linears):
        known = first.setdefault((linear.module, linear.first), linear)
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
