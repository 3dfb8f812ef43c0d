"""Output heads that are tied to a table of embeddings: which heads those are in a package, and which changes of an
adapter reach them. The adapter's file names the table alone. It knows no format and no method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from onnx_lora.adapters.adapter import Adapter, Change, Delta, MatrixDelta, OfTable
from onnx_lora.adapters.factors import as_matrices
from onnx_lora.heads import TIED_OUTPUT_LAYERS
from onnx_lora.kinds import Embedding

if TYPE_CHECKING:
    from onnx_lora.package import Package
    from onnx_lora.points import InjectionPoint

__all__ = ["SpreadAdapter", "spread_to_tied_heads"]

_UNTIE = '"tie_word_embeddings": false in the package\'s config.json says that nothing is tied'


@dataclass(frozen=True)
class SpreadAdapter:
    """An adapter that has its changes of a table for the tied heads too. `problems`: where ties cannot be decided."""

    adapter: Adapter
    problems: tuple[str, ...] = ()


def spread_to_tied_heads(adapter: Adapter, package: Package, config: Mapping[str, Any]) -> SpreadAdapter:
    """Add the changes of tables to the heads that are tied to them. `config`: of the package's model.

    The tool that trained the adapter decides: PEFT puts trained tokens (`OfTable`) into a tied head, MLX its LoRA on a
    table (`Adapter.with_tied_heads`); PEFT's own LoRA on a table stays there.
    """
    ties = _Ties(package, config.get("tie_word_embeddings"))
    changes: dict[str, Change] = dict(adapter.changes)
    deltas: dict[str, Delta | MatrixDelta] = dict(adapter.deltas)
    problems: list[str] = []
    for module, change in adapter.changes.items():
        point = package.points.get(module)
        if point is None or not isinstance(change, OfTable):
            continue
        changes[module] = change.of_kind(point.kind)
        if isinstance(point.kind, Embedding):
            for head in ties.heads_of(point, change.method, problems):
                if head.module not in adapter.changes:
                    changes[head.module] = change.of_kind(head.kind)
    for module, delta in adapter.deltas.items():
        point = package.points.get(module)
        if point is None or module not in adapter.with_tied_heads or not isinstance(point.kind, Embedding):
            continue
        for head in ties.heads_of(point, "this LoRA", problems):
            if head.module in adapter.deltas:
                problems.append(f"{head.module}: is tied to {module}, and the adapter has a delta for each of the two")
            else:
                deltas[head.module] = _of_head(as_matrices(point, delta))
    return SpreadAdapter(replace(adapter, changes=changes, deltas=deltas), tuple(problems))


def _of_head(delta: MatrixDelta) -> MatrixDelta:
    """A change of a table, `[entries, features]`, as that of a linear head, whose outputs are the entries."""
    return replace(delta, a=delta.b.T, b=delta.a.T)


@dataclass(frozen=True)
class _Ties:
    """What a package says of its ties: by its config, by equal weights, and by the names of its modules.

    `tied_by_config`: the config's `tie_word_embeddings`; None where it does not say.
    """

    package: Package
    tied_by_config: object

    def heads_of(self, table: InjectionPoint, what: str, problems: list[str]) -> list[InjectionPoint]:
        """The points whose weight is the table's own. Where that cannot be decided, a problem is added.

        what: the change of the table, as messages call it.
        """
        if self.tied_by_config is False:
            return []
        tied = [point for point in self._same_weight[table.sha256] if self._is_tied(point, table)]
        problem = self._problem(table, what, found=bool(tied), expected=bool(self.tied_by_config))
        if problem is not None:
            problems.append(f"{table.module}: {problem}")
        return tied

    def _is_tied(self, point: InjectionPoint, table: InjectionPoint) -> bool:
        return point.module != table.module and _is_comparable(point, table)

    def _problem(self, table: InjectionPoint, what: str, *, found: bool, expected: bool) -> str | None:
        """Why it cannot be decided which heads are tied to a table; None: it can.

        found: a tied point is known. expected: the config says that there is a tied head.
        """
        points = self.package.points
        other_heads = [name for name in self._heads if name != table.module]
        without_point = [name for name in self._heads_without_points if name not in points or name == table.module]
        tied = self._tied_without_points(table)
        if tied:
            return (
                f"{what} must change {tied[0]} too, which is tied to it, and the package has no point there; export "
                f"again with `targets=` including {tied[0].rpartition('.')[2]}"
            )
        unknown = [name for name in without_point if not self._is_known_to_differ(name, table)]
        if unknown:
            head = unknown[0]
            return (
                f"{what} must change {head} too if the two are tied, and without a point at {head} the package does "
                f"not show whether they are; export again with `targets=` including {head.rpartition('.')[2]}. If they "
                f"are not tied: {_UNTIE}"
            )
        if found:
            return None
        incomparable = [name for name in other_heads if not _is_comparable(points[name], table)]
        if incomparable:
            return (
                f"{what} must change {incomparable[0]} too if the two are tied, and the package does not show whether "
                f"they are, because it does not keep both unrounded and in one type. If they are not tied: {_UNTIE}"
            )
        if not other_heads and not without_point and (expected or self._has_unplaced):
            return (
                f"{what} must change the output head that is tied to the table too, and the package has none with a "
                f"point. If nothing is tied to it: {_UNTIE}"
            )
        return None

    def _tied_without_points(self, table: InjectionPoint) -> list[str]:
        """The modules without a point whose weight is the table's own."""
        tied: list[str] = []
        for known in self.package.tables.values():
            is_equal = known.sha256 == table.sha256 and known.dtype == table.dtype
            if is_equal and known.module not in self.package.points:
                tied.append(known.module)
        return tied

    def _is_known_to_differ(self, module: str, table: InjectionPoint) -> bool:
        """Whether the weight of a module without a point is known, and is not the table's."""
        known = self.package.tables.get(module)
        if known is None or known.dtype != table.dtype or table.is_quantized:
            return False
        return known.sha256 != table.sha256

    @cached_property
    def _has_unplaced(self) -> bool:
        return any(graph.unplaced for graph in self.package.manifest.graphs)

    @cached_property
    def _same_weight(self) -> Mapping[str, list[InjectionPoint]]:
        """The points by the digest of their weight."""
        found: dict[str, list[InjectionPoint]] = {}
        for point in self.package.points.values():
            found.setdefault(point.sha256, []).append(point)
        return found

    @cached_property
    def _heads(self) -> list[str]:
        """Points that are output heads by their names."""
        return [module for module in self.package.points if _is_head(module)]

    @cached_property
    def _heads_without_points(self) -> list[str]:
        """Output heads, by their names, that the package names otherwise than by a point."""
        names: list[str] = []
        for graph in self.package.manifest.graphs:
            names.extend(graph.untargeted)
        names.extend(weight.module for weight in self.package.replaceable.values())
        return [name for name in dict.fromkeys(names) if _is_head(name)]


def _is_head(module: str) -> bool:
    return module.rpartition(".")[2] in TIED_OUTPUT_LAYERS


def _is_comparable(point: InjectionPoint, table: InjectionPoint) -> bool:
    """Whether the digests of both tell whether their weights are equal."""
    is_quantized = point.is_quantized or table.is_quantized
    return point.dtype == table.dtype and (not is_quantized or point.sha256 == table.sha256)
