"""Which modules of a package share one weight with which others: by equal weights, by the model's config, and by the
names of modules where neither tells. It knows no adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from onnx_lora.heads import OFTEN_TIED, TIED_OUTPUT_LAYERS
from onnx_lora.kinds import Embedding
from onnx_lora.roles import Table

if TYPE_CHECKING:
    from onnx_lora.package import Package

__all__ = ["UNTIE", "Relation", "Ties"]

# What a user can do where nothing is tied, and the package does not show it.
UNTIE = '"tie_word_embeddings": false in the package\'s config.json says that nothing is tied'

Relation = Literal["tied", "apart", "unknown"]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A module's weight, as far as the package shows it. `is_exact`: it is kept unrounded."""

    module: str
    sha256: str
    dtype: str
    is_exact: bool = True
    is_table: bool = False

    def relation(self, other: _Weight) -> Relation:
        """Whether the two are one weight, by their values."""
        if self.sha256 == other.sha256 and self.dtype == other.dtype:
            return "tied"
        are_comparable = self.dtype == other.dtype and self.is_exact and other.is_exact
        return "apart" if are_comparable else "unknown"


@dataclass(frozen=True)
class Ties:
    """What a package says of its ties.

    `tied_by_config`: the config's `tie_word_embeddings`; None where it does not say.
    """

    package: Package
    tied_by_config: object

    def is_head(self, module: str) -> bool:
        """Whether it is an output head, by its name."""
        return _last_part(module) in TIED_OUTPUT_LAYERS

    def may_be_tied(self, module: str) -> bool:
        """Whether it is an output head or a table of embeddings, by its name or by what the graph does with it."""
        weight = self.weights.get(module)
        return _last_part(module) in OFTEN_TIED or (weight is not None and weight.is_table)

    def relation(self, module: str, other: str) -> Relation:
        """Whether two modules have one weight."""
        if self.tied_by_config is False and self.is_head(module) != self.is_head(other):
            return "apart"
        one, another = self.weights.get(module), self.weights.get(other)
        return "unknown" if one is None or another is None else one.relation(another)

    def others(self, module: str) -> dict[str, Relation]:
        """The other modules that have the same weight as `module`, and those that may have it."""
        found: dict[str, Relation] = {}
        own = self.weights.get(module)
        same = [] if own is None else self._by_digest[own.sha256]
        names = [weight.module for weight in same]
        if self.may_be_tied(module):
            names.extend(self._named_as_tied)
        for name in names:
            relation = self.relation(module, name)
            if name != module and relation != "apart":
                found[name] = relation
        return found

    @property
    def may_be_hidden(self) -> bool:
        """Whether a graph may compute with a table without the package naming the module that does."""
        graphs = self.package.manifest.graphs
        if any(graph.unplaced for graph in graphs):
            return True
        is_complete = len(graphs) == 1 and graphs[0].tables is not None
        return bool(self.tied_by_config) and not is_complete

    @cached_property
    def weights(self) -> Mapping[str, _Weight]:
        """The weights that the package knows the values of, by module."""
        return {weight.module: weight for weight in self._list_weights()}

    def _list_weights(self) -> Iterator[_Weight]:
        for graph in self.package.manifest.graphs:
            for known in graph.tables or ():
                yield _Weight(known.module, known.sha256, known.dtype)
        for weight in self.package.replaceable.values():
            # Norms and biases may be equal by accident.
            if weight.name.endswith(".weight") and len(weight.shape) > 1:
                is_table = isinstance(weight.role, Table)
                yield _Weight(weight.module, weight.sha256, weight.dtype, is_table=is_table)
        for point in self.package.points.values():
            is_table = isinstance(point.kind, Embedding)
            yield _Weight(point.module, point.sha256, point.dtype, not point.is_quantized, is_table)

    @cached_property
    def _by_digest(self) -> Mapping[str, list[_Weight]]:
        found: dict[str, list[_Weight]] = {}
        for weight in self.weights.values():
            found.setdefault(weight.sha256, []).append(weight)
        return found

    @cached_property
    def _named_as_tied(self) -> list[str]:
        return sorted(module for module in self.package.modules if _last_part(module) in OFTEN_TIED)


def _last_part(module: str) -> str:
    return module.rpartition(".")[2]
