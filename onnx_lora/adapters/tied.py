"""What an adapter does to a table of embeddings it may do to an output head that is tied to that too; the file names
the table alone. It knows how a package shows a tie, and nothing of formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from onnx_lora.adapters.adapter import Adapter, Change, Delta, MatrixDelta
from onnx_lora.adapters.factors import as_matrices
from onnx_lora.adapters.methods.tokens import TokenRows
from onnx_lora.adapters.model_config import config_of
from onnx_lora.heads import TIED_OUTPUT_LAYERS
from onnx_lora.kinds import Embedding
from onnx_lora.package import Package
from onnx_lora.points import InjectionPoint

__all__ = ["with_tied"]

_UNTIE = '"tie_word_embeddings": false in the package\'s config.json says that nothing is tied'


def with_tied(adapter: Adapter, package: Package) -> tuple[Adapter, list[str]]:
    """The adapter with what reaches a table put into what is tied to it too, and why that cannot be said of some.

    PEFT puts trained tokens into a tied head, MLX its LoRA on a table; PEFT's own LoRA stays at the table.
    """
    spread = _Spread(adapter, package)
    for module, change in adapter.changes.items():
        if isinstance(change, TokenRows):
            spread.tokens(module, change)
    for module, delta in adapter.deltas.items():
        point = package.points.get(module) if module in adapter.with_tied_heads else None
        if point is not None and isinstance(point.kind, Embedding):
            spread.factors(point, as_matrices(point, delta))
    return replace(adapter, changes=spread.changes, deltas=spread.deltas), spread.problems


@dataclass
class _Spread:
    adapter: Adapter
    package: Package
    changes: dict[str, Change] = field(init=False)
    deltas: dict[str, Delta | MatrixDelta] = field(init=False)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changes, self.deltas = dict(self.adapter.changes), dict(self.adapter.deltas)

    def tokens(self, module: str, change: TokenRows) -> None:
        point = self.package.points.get(module)
        if point is None:
            return
        self.changes[module] = change.of_kind(point.kind)
        if isinstance(point.kind, Embedding):
            for head in self._tied(point, "trained tokens"):
                if head.module not in self.adapter.changes:
                    self.changes[head.module] = change.of_kind(head.kind)

    def factors(self, point: InjectionPoint, delta: MatrixDelta) -> None:
        """The table's change, `[entries, features]`, is a linear head's the other way round."""
        for head in self._tied(point, "this LoRA on its table"):
            if head.module in self.adapter.deltas:
                self.problems.append(f"{head.module}: is tied to {point.module}, and has a delta of its own too")
            else:
                self.deltas[head.module] = replace(delta, a=delta.b.T, b=delta.a.T)

    def _tied(self, table: InjectionPoint, what: str) -> list[InjectionPoint]:
        """The points whose weight is the table's own. Where that cannot be told, a problem says so."""
        says = config_of(self.package).get("tie_word_embeddings")
        if says is False:
            return []
        points = self.package.points
        equal = [point for point in self._by_weight[table.sha256] if point.module != table.module]
        tied = [point for point in equal if _comparable(point, table)]
        placed = [name for name in self._heads if name != table.module]
        unknown = [name for name in placed if not _comparable(points[name], table)]
        heads = [name for name in self._heads_without_points if name not in points or name == table.module]
        if heads:
            self.problems.append(
                f"{table.module}: {what} must reach {heads[0]} too if that is tied to it, and without a point there "
                f"nothing tells; export again with --targets including {heads[0].rpartition('.')[2]}, or, if it is not "
                f"tied: {_UNTIE}"
            )
        elif unknown and not tied:
            self.problems.append(
                f"{table.module}: {what} must reach {unknown[0]} too if that is tied to it, and rounded otherwise than "
                f"the table its weight does not tell. If it is not tied: {_UNTIE}"
            )
        elif not tied and not placed and (says or any(graph.unplaced for graph in self.package.manifest.graphs)):
            self.problems.append(
                f"{table.module}: {what} must reach an output head that is tied to it, and the package has none with a "
                f"point. If there is none: {_UNTIE}"
            )
        return tied

    @cached_property
    def _by_weight(self) -> Mapping[str, list[InjectionPoint]]:
        """The points by the digest of their weight."""
        found: dict[str, list[InjectionPoint]] = {}
        for point in self.package.points.values():
            found.setdefault(point.sha256, []).append(point)
        return found

    @cached_property
    def _heads(self) -> list[str]:
        """Points that are output heads by their names."""
        return [module for module in self.package.points if module.rpartition(".")[2] in TIED_OUTPUT_LAYERS]

    @cached_property
    def _heads_without_points(self) -> list[str]:
        """Modules that the package names otherwise than by a point, and that are output heads by their names."""
        names = [name for graph in self.package.manifest.graphs for name in graph.untargeted]
        names += [weight.module for weight in self.package.replaceable.values()]
        return [name for name in dict.fromkeys(names) if name.rpartition(".")[2] in TIED_OUTPUT_LAYERS]


def _comparable(point: InjectionPoint, table: InjectionPoint) -> bool:
    """Whether equal digests mean equal weights, and other digests other ones."""
    quantized = point.is_quantized or table.is_quantized
    return point.dtype == table.dtype and (not quantized or point.sha256 == table.sha256)
