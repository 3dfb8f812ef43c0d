"""Places in a graph, for branches and for whole weights: the nouns, which `find_sites` and `whole_weights` fill."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.exporter.graph.placement import Placement
from onnx_lora.exporter.graph.product import Product
from onnx_lora.exporter.graph.values import axes_of, unwrap
from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind
from onnx_lora.exporter.locating.located import Occurrence, UnplacedNode

__all__ = ["Site", "Sites", "WholeWeightSite", "WholeWeightSites"]


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a graph: products of one activation, and the modules they compute. Side by side, the products'
    outputs are the modules' outputs: one product with one module, or with several (packed), or several with one
    (cut up)."""

    occurrences: tuple[Occurrence, ...]
    placement: Placement

    @property
    def node(self) -> ir.Node:
        """The first product's."""
        return self.occurrences[0].node

    @property
    def graph_kind(self) -> GraphKind:
        """What graphs show of modules of the kind that is computed here: all are of one."""
        return self.occurrences[0].graph_kind

    @property
    def products(self) -> tuple[Product, ...]:
        by_node = {one.node: one.product for one in self.occurrences}
        return tuple(by_node.values())

    @property
    def input(self) -> ir.Value:
        return self.occurrences[0].product.source

    @property
    def label(self) -> str:
        """What new nodes are called after: the module, or the node of several."""
        if len(self.modules) == 1:
            return self.modules[0]
        return self.node.name or self.modules[0]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.module for one in self.occurrences))


@dataclass(frozen=True, slots=True)
class Sites:
    """What one graph offers: places that can get a branch, and nodes that cannot, with the reason."""

    sites: tuple[Site, ...]
    unplaced: tuple[UnplacedNode, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of all places, in the graph's order."""
        found: dict[str, None] = {}
        for site in self.sites:
            found.update(dict.fromkeys(site.modules))
        return tuple(found)

    @property
    def occurrences(self) -> tuple[Occurrence, ...]:
        """What is computed at all places, in the graph's order."""
        found: list[Occurrence] = []
        for site in self.sites:
            found.extend(site.occurrences)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class WholeWeightSite:
    """Where a whole weight lies in a graph that an adapter may replace: of the one node of a linear module, or an
    initializer as it is.

    `name`: the torch parameter's. `value` is the initializer, or the Identity that stands for it under the parameter's
    name. `site` is the linear module's, `is_bias` whether it is its bias; where it is no linear module's, `user` is the
    node that computes with it.
    """

    name: str
    value: ir.Value
    site: Site | None = None
    is_bias: bool = False
    user: ir.Node | None = None

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def table_reader(self) -> ir.Node | None:
        """The lookup, where it is an embedding's table; it may read the table turned."""
        is_table = self.user is not None and self.user.op_type == "Gather" and axes_of(self.value) == 2
        return self.user if is_table else None

    @property
    def is_turned(self) -> bool:
        """Whether it is a table that lies the other way round: a head's weight that is looked up too."""
        if self.table_reader is None:
            return False
        _, wrappers = unwrap(self.table_reader.inputs[0])
        return sum(wrapper.op_type == "Transpose" for wrapper in wrappers) % 2 == 1

    @property
    def occurrence(self) -> Occurrence | None:
        """What computes with it, where it is a linear module's."""
        return None if self.site is None else self.site.occurrences[0]


@dataclass(frozen=True, slots=True)
class WholeWeightSites:
    """What one graph lets adapters replace of what was asked for; `refused` says of the rest why not, by name."""

    found: tuple[WholeWeightSite, ...]
    refused: dict[str, str]
