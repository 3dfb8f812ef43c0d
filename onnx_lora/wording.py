"""Results in words: for each result of a command the lines of a table for people, by what stands in front of them. It
knows results as data, and prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

from onnx_lora.results import (
    AdapterResult,
    BatchResult,
    ConvertResult,
    CoverageResult,
    Doubt,
    FoldedResult,
    FoldResult,
    InspectedAdapter,
    PackageResult,
    RunResult,
    TextAgreement,
    VerifyResult,
)

__all__ = ["Lines", "format_shape", "format_size", "in_words"]

Lines = dict[str, Any]

# What is done with a whole weight that does not take the place of the base's.
_OPERATIONS = {"set": "", "add": " added to the base's", "multiply": " times the base's, if there is one"}


@singledispatch
def in_words(result: object) -> Lines:
    """The lines of a result: texts, numbers, lists and mappings of these."""
    raise TypeError(f"nothing says a {type(result).__name__} in words")


@in_words.register
def _(result: PackageResult) -> Lines:
    lines: Lines = {
        "package": result.package,
        "made from": result.made_from,
        "graphs": result.graphs,
        "points": result.points,
        "points by name": result.points_by_name,
        "one adapter a batch": result.whole_batch_only,
        "replaceable": {weight.name: format_shape(weight.shape) for weight in result.replaceable},
        "out of reach": [f"{entry.graph}: {entry.node}: {entry.reason}" for entry in result.without_point],
        "not targeted": result.not_targeted,
        "unproven": _by_reason(result.unproven),
        "size": format_size(result.size_bytes),
        "fingerprint": result.fingerprint,
    }
    if result.untrained:
        lines["random at export"] = result.untrained
    if result.verification is not None:
        lines["verified"] = _worst_differences(result.verification)
    return lines


@in_words.register
def _(result: AdapterResult) -> Lines:
    weights: dict[str, str] = {}
    for weight in result.whole_weights:
        weights[weight.name] = format_shape(weight.shape) + _OPERATIONS[weight.operation]
    return {
        "adapter": result.adapter,
        "format": result.format,
        "method": result.method,
        "base model": result.base_model or "not said",
        "modules": result.modules,
        "ranks": {f"rank {count.rank}": _modules(count.modules) for count in result.ranks},
        "scales": {f"scale {count.scale:.6g}": _modules(count.modules) for count in result.scales},
        "other changes": result.other_changes,
        "whole weights": weights,
        "size": format_size(result.size_bytes),
        "notes": result.notes,
    }


@in_words.register
def _(result: CoverageResult) -> Lines:
    share = "it is empty"
    if result.size_bytes:
        share = f"{result.base_size_bytes / result.size_bytes:.0f} times smaller than the base"
    return {
        "changes": f"{len(result.applied)} of {result.points} points",
        "leaves as they are": result.at_base,
        "replaces": result.replaced,
        "without effect": result.without_effect,
        "only folds": {entry.module: entry.reason for entry in result.fold_only},
        "size as inputs": f"{format_size(result.size_bytes)}, {share}",
        "notes": result.notes,
    }


@in_words.register
def _(result: InspectedAdapter) -> Lines:
    lines = in_words(result.adapter)
    if result.coverage is not None:
        lines |= in_words(result.coverage)
    if result.written is not None:
        lines["written"] = result.written
    return lines


@in_words.register
def _(result: ConvertResult) -> Lines:
    lines: Lines = {}
    if result.coverage is not None:
        lines = in_words(result.coverage)
    elif result.adapter is not None:
        lines = in_words(result.adapter)
    return lines | {"written": result.written}


@in_words.register
def _(result: BatchResult) -> Lines:
    notes: list[str] = []
    failures: list[str] = []
    for entry in result.adapters:
        place = entry.adapter if entry.chosen is None else f"{entry.adapter}, {entry.chosen}"
        notes.extend(f"{place}: {note}" for note in entry.notes)
        if entry.error is not None:
            older = "; the older output is still there" if entry.keeps_older else ""
            failures.append(f"{place}: {entry.error.message}{older}")
    return {
        "written": result.written,
        "up to date": result.up_to_date,
        "failed": failures,
        "notes": notes,
        "no adapters": result.passed_over,
        "adapter is gone": result.left_over,
    }


@in_words.register
def _(result: FoldedResult) -> Lines:
    adapters: list[str] = []
    for one in result.adapters:
        groups = "".join(f", {group} {weight:g}" for group, weight in one.groups.items())
        adapters.append(f"{one.adapter}: times {one.weight:g}{groups}, {one.method}, {one.sha256[:12]}…")
    return {
        "folded model": result.model,
        "adapters": adapters,
        "graphs": result.graphs,
        "made from": result.made_from,
        "fingerprint": result.fingerprint,
    }


@in_words.register
def _(result: RunResult) -> Lines:
    shapes = {output.name: format_shape(output.shape) for output in result.outputs}
    return {"outputs": shapes, "written": result.written}


@in_words.register
def _(result: FoldResult) -> Lines:
    notes: list[str] = []
    for adapter in result.adapters:
        notes.extend(f"{adapter.adapter}: {note}" for note in adapter.notes)
    folded = [f"{adapter.adapter}: times {adapter.weight:g}" for adapter in result.adapters]
    lines: Lines = {"folded": folded, "notes": notes, "written": result.written}
    if result.rounding:
        lines["error of weights"] = {entry.module: entry.error_of_weight for entry in result.rounding}
        lines["error of the change"] = {entry.module: entry.error_of_change for entry in result.rounding}
    return lines


@in_words.register
def _(result: VerifyResult) -> Lines:
    lines: Lines = {"agrees": "yes" if result.agrees else "no", "largest difference": _worst_differences(result)}
    outputs: list[str] = []
    for entry in result.outputs:
        of = f" {entry.adapter}" if entry.adapter else ""
        difference = "no number" if entry.difference is None else f"{entry.difference:.3g}"
        outputs.append(f"{entry.graph}, {entry.case}{of}, {entry.output}: {difference} (allowed {entry.allowed:.3g})")
    lines["outputs"] = outputs
    if result.left_out:
        lines["compared without"] = {graph: ", ".join(names) for graph, names in result.left_out.items()}
    if result.texts:
        lines["on your texts"] = [_say_texts(one) for one in result.texts]
    if result.proven or result.unproven:
        lines |= {"proven now": len(result.proven), "unproven": _by_reason(result.unproven)}
    return lines


def _say_texts(one: TextAgreement) -> str:
    """How far the package is from the float model, in one line."""
    said = f"{one.adapter or 'base'}: {one.agreement:.1%} of {one.answers} answers are the float model's"
    if one.loss_float is None or one.loss_package is None:
        return said
    return f"{said}; loss {one.loss_package:.4f}, the float model's {one.loss_float:.4f}"


def _worst_differences(result: VerifyResult) -> dict[str, float]:
    """The largest difference by graph and case."""
    worst: dict[str, float] = {}
    for entry in result.outputs:
        case = f"{entry.graph}, {entry.case} {entry.adapter}".rstrip()
        difference = float("inf") if entry.difference is None else entry.difference
        worst[case] = max(worst.get(case, 0.0), difference)
    return worst


def _by_reason(doubts: Sequence[Doubt]) -> Mapping[str, Sequence[str]]:
    return {doubt.reason: doubt.names for doubt in doubts}


def _modules(count: int) -> str:
    return "1 module" if count == 1 else f"{count} modules"


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
