"""What a command tells about packages, adapters and results, as facts by name: numbers, texts, lists and mappings. It
knows packages and adapters as data, and prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_lora.adapters import Adapter, BoundAdapter, Replacement
    from onnx_lora.exporter import Comparison
    from onnx_lora.package import Package
    from onnx_lora.runtime import Requantize

__all__ = [
    "Facts",
    "describe_adapter",
    "describe_coverage",
    "describe_package",
    "describe_rounding",
    "describe_verification",
    "format_shape",
    "format_size",
    "group_by_reason",
]

Facts = dict[str, Any]

# What is done with a whole weight that does not take the place of the base's.
_OPERATIONS = {"set": "", "add": " added to the base's", "multiply": " times the base's, if there is one"}


def describe_package(package: Package, *, full: bool = False) -> Facts:
    """What a package offers to adapters, and what of its graphs it does not. `full`: every module with its sizes."""
    graphs = package.manifest.graphs
    points = list(package.points.values())
    without_point: list[str] = []
    not_targeted: set[str] = set()
    for graph in graphs:
        without_point.extend(f"{graph.name}: {entry.node}: {entry.reason}" for entry in graph.unplaced)
        not_targeted.update(graph.untargeted)
    facts: Facts = {
        "package": str(package.path),
        "made_from": package.manifest.source,
        "graphs": [graph.name for graph in graphs],
        "points": len(points),
        "points_by_name": dict(Counter(module.rpartition(".")[2] for module in package.points)),
        "without_rows": [point.module for point in points if not point.per_row],
        "replaceable": {name: format_shape(weight.shape) for name, weight in package.replaceable.items()},
        "without_point": without_point,
        "unproven": group_by_reason(package.unproven),
        "not_targeted": sorted(not_targeted),
        "size": format_size(_count_bytes(package)),
        "fingerprint": package.fingerprint,
    }
    if full:
        modules: dict[str, str] = {}
        for point in points:
            modules[point.module] = f"{point.in_features} → {point.out_features} {point.dtype}"
        facts["modules"] = modules
    return facts


def describe_adapter(adapter: Adapter) -> Facts:
    """What an adapter's files hold."""
    size = 0
    for delta in adapter.deltas.values():
        size += delta.a.nbytes + delta.b.nbytes
    for replacement in adapter.replacements.values():
        size += replacement.value.nbytes
    ranks = _count_modules(delta.rank for delta in adapter.deltas.values())
    scales = _count_modules(round(delta.scale, 6) for delta in adapter.deltas.values())
    return {
        "adapter": adapter.origin.path,
        "format": adapter.origin.format,
        "method": adapter.origin.method,
        "base_model": adapter.origin.base_model,
        "modules": len(adapter.deltas) + len(adapter.changes),
        "changes": dict(Counter(change.method for change in adapter.changes.values())),
        "ranks": {f"rank {rank}": modules for rank, modules in ranks.items()},
        "scales": {f"scale {scale:g}": modules for scale, modules in scales.items()},
        "whole_weights": {name: _describe_whole_weight(entry) for name, entry in adapter.replacements.items()},
        "size": format_size(size),
        "notes": list(adapter.notes),
    }


def describe_coverage(bound: BoundAdapter, package: Package | None = None) -> Facts:
    """What a bound adapter does to its package. `package`: compare the adapter's size with this base's."""
    coverage = bound.coverage
    size = sum(value.nbytes for value in bound.tensors.values())
    facts: Facts = {
        "applied": f"{len(coverage.applied)} of {len(coverage.applied) + len(coverage.at_base)} points",
        "left_at_base": list(coverage.at_base),
        "replaced": list(coverage.replaced),
        "without_effect": list(coverage.silent),
        "only_folds": dict(coverage.fold_only),
        "bound_size": format_size(size),
        "notes": list(coverage.notes),
    }
    if package is not None:
        facts["smaller_than_the_base"] = f"{_count_bytes(package) / size:.0f} times" if size else "it is empty"
    return facts


def describe_rounding(requantize: Requantize | None) -> Facts:
    """What folding into quantized weights cost, the worst modules first; nothing where no weight was quantized again.

    Both are ratios of norms, as `Rounding` explains them.
    """
    if requantize is None:
        return {}
    worst_first = sorted(requantize.rounding.items(), key=lambda entry: entry[1].of_change, reverse=True)
    return {
        "error of weights": {module: rounding.of_weight for module, rounding in worst_first},
        "error of the change": {module: rounding.of_change for module, rounding in worst_first},
    }


def describe_verification(comparisons: Sequence[Comparison]) -> Facts:
    """The largest difference by case and graph, then each output."""
    worst: dict[str, float] = {}
    outputs: list[str] = []
    for entry in comparisons:
        case = f"{entry.graph}, {entry.case}"
        worst[case] = max(worst.get(case, 0.0), entry.difference)
        outputs.append(f"{case}, {entry.output}: {entry.difference:.3g} (allowed {entry.allowed:.3g})")
    return {
        "agrees": all(entry.agrees for entry in comparisons),
        "largest_difference": worst,
        "outputs": outputs,
    }


def group_by_reason(doubts: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of each reason, from the reason of each name."""
    names: dict[str, list[str]] = {}
    for name, reason in doubts.items():
        names.setdefault(reason, []).append(name)
    return names


def format_size(count: float) -> str:
    """A number of bytes with its unit: `1.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def format_shape(shape: Sequence[int]) -> str:
    """A tensor's shape: `2 × 32`."""
    return " × ".join(map(str, shape)) or "scalar"


def _count_modules(values: Iterable[float]) -> dict[float, str]:
    """How many modules have each value, the lowest value first."""
    counts = Counter(values)
    return {value: f"{counts[value]} modules" for value in sorted(counts)}


def _describe_whole_weight(entry: Replacement) -> str:
    return format_shape(entry.value.shape) + _OPERATIONS[entry.operation]


def _count_bytes(package: Package) -> int:
    """The size of a package's graphs and weights, in bytes."""
    files: set[str] = set()
    for graph in package.manifest.graphs:
        files.update([graph.file, graph.base_file])
        for point in graph.points:
            files.update(part.stored.file for part in point.parts)
    return sum((package.path / file).stat().st_size for file in files)
