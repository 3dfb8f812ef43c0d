"""A package against the PyTorch model it was made from: the base, PEFT adapters, and what that proves of its points."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lora.boundary import public
from onnx_lora.errors import PackageError, VerificationError
from onnx_lora.exporter.elsewhere import call_in
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.frontends.source import ModelSource, Original, Reference
from onnx_lora.exporter.frontends.sources import python_of, recorded_source
from onnx_lora.exporter.intake.load import load
from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.exporter.locating.doubts import drop_miscounted
from onnx_lora.exporter.locating.locate import locate
from onnx_lora.exporter.ort_check import open_graph
from onnx_lora.exporter.verification.adapters import TriedAdapter, put_on_model
from onnx_lora.exporter.verification.comparison import Comparison, compare, compare_int8, compare_rows, run_case
from onnx_lora.exporter.verification.quantized_reference import adopt_quantized
from onnx_lora.exporter.verification.random_adapters import put_adapter, put_weights
from onnx_lora.exporter.weights.torch_weights import read_module_weights
from onnx_lora.folded import FoldedModel
from onnx_lora.manifest import GraphInfo
from onnx_lora.package import Package

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = ["verify", "verify_folded", "verify_original"]

# What the manifest calls graphs that no exporter of ours made.
_MADE_ELSEWHERE = ("attach",)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Trial:
    """What was tried: all comparisons, and the modules and parameters that were changed for them."""

    comparisons: list[Comparison] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)


@public
def verify(
    package: Package,
    checkpoint: str | os.PathLike[str] | ModelSource,
    *,
    adapter: str | os.PathLike[str] | None = None,
    tensors: Mapping[str, Array] | None = None,
    adapters: Sequence[TriedAdapter] = (),
) -> list[Comparison]:
    """Compare a package with the model it was made from, in PyTorch.

    A graph that somebody else exported may lack inputs that the model has (`token_type_ids`). The model is not given
    them either, and `Comparison.left_out` names them.

    Where random adapters are tried (no `adapter` is given) and agree, the unproven points and whole weights that they
    reach are proven, and the manifest is written anew to say so.

    checkpoint: the model's folder or hub id, which the exporter that the manifest names loads; or a source of graphs,
        as `export` takes it: `TorchModule(module, example_inputs=...)`.
    adapter: a PEFT folder that PEFT loads into the model; `tensors` is the same adapter, bound to the
        package, by the names of its inputs. Without them random adapters are tried.
    adapters: several of these, one by one.

    Gives one comparison for each output of each graph and case.

    Raises VerificationError: the outputs differ by more than rounding. ModelError: no such checkpoint, or PEFT cannot
    load the adapter. ExportError: a graph cannot run. MissingDependencyError: torch, PEFT, or what loads the
    checkpoint is not installed.
    """
    if isinstance(checkpoint, str | os.PathLike):
        source = recorded_source(package.manifest.source, checkpoint)
    else:
        source = checkpoint
    tried = list(adapters)
    if adapter is not None:
        tried.append(TriedAdapter(Path(adapter).name, adapter, tensors or {}))
    return call_in(python_of(source, package), _verify, package, source, tried)


def _verify(package: Package, source: ModelSource, tried: Sequence[TriedAdapter]) -> list[Comparison]:
    original = _like_with_like(package, source.load_original(package))
    if tried:
        return _compare_adapters(package, original, tried)
    trial = _try_all(package, original)
    if package.unproven:
        uncounted = _check_calls(package, original)
        package.record_proof(_seen(package, trial) & set(package.unproven) - uncounted)
    return trial.comparisons


def verify_original(package: Package, original: Original) -> list[Comparison]:
    """Compare a package with the live torch model: base, random adapter, and a different adapter per row.

    The model is as it was afterwards; where the package quantized its weights, it keeps them as they are there.

    Raises VerificationError: they differ by more than rounding.
    """
    return _try_all(package, original).comparisons


def _like_with_like(package: Package, original: Original) -> Original:
    """The original whose references leave out what the package's graphs have no input for. Of graphs that were made
    here nothing is left out: an exporter that drops an input is to be seen."""
    if package.manifest.source.get("made_by") not in _MADE_ELSEWHERE:
        return original

    def references() -> list[Reference]:
        found: list[Reference] = []
        for case in original.references():
            lacking = _left_out(package, case)
            found.append(case.without(lacking) if lacking and case.without is not None else case)
        return found

    return Original(original.model, references)


def _left_out(package: Package, case: Reference) -> tuple[str, ...]:
    """The model's inputs that a graph of the package has not."""
    try:
        file = package.path / package.graph(case.graph).file
    except PackageError:
        return ()  # told where it is compared
    return case.left_out([value.name for value in open_graph(file).get_inputs()])


def _compare_adapters(package: Package, original: Original, adapters: Sequence[TriedAdapter]) -> list[Comparison]:
    """The base, and adapters that PEFT loads into the model one by one."""
    comparisons: list[Comparison] = []
    adopt_quantized(package, original.model)
    cases = original.references()
    bases = [run_case(package, case, {}) for case in cases]
    for case, base in zip(cases, bases, strict=True):
        comparisons += compare(package, case, "base", base)
    for adapter in adapters:
        with put_on_model(original.model, [adapter]):
            for case, base in zip(cases, bases, strict=True):
                compared = compare(package, case, "adapter", run_case(package, case, adapter.tensors), base)
                comparisons += [replace(entry, adapter=adapter.name) for entry in compared]
    _judge(package, comparisons)
    return comparisons


@public
def verify_folded(
    model: FoldedModel, checkpoint: str | os.PathLike[str], adapters: Sequence[TriedAdapter]
) -> list[Comparison]:
    """Compare a folded model with its checkpoint and the adapters that were folded in, all at once, in PyTorch.

    Raises VerificationError: the outputs differ by more than rounding. ModelError: no such checkpoint, or PEFT cannot
    load or blend the adapters. ExportError: a graph cannot run. MissingDependencyError.
    """
    package = model.as_package()
    source = recorded_source(package.manifest.source, checkpoint)
    return call_in(python_of(source, package), _verify_folded, package, source, adapters)


def _verify_folded(package: Package, source: ModelSource, adapters: Sequence[TriedAdapter]) -> list[Comparison]:
    original = source.load_original(package)
    comparisons: list[Comparison] = []
    with put_on_model(original.model, adapters):
        names = {graph.name for graph in package.manifest.graphs}
        for case in original.references():
            if case.graph in names:
                comparisons += compare(package, case, "folded", run_case(package, case, {}, as_it_is=True))
    _judge(package, comparisons)
    return comparisons


def _try_all(package: Package, original: Original) -> _Trial:
    """Try the base, other values of whole weights, and random adapters on all points, on all rows and on some.

    Raises VerificationError: an output differs by more than rounding.
    """
    trial, model = _Trial(), original.model
    adopt_quantized(package, model)
    cases = original.references()
    bases: list[dict[str, Array]] = []
    for case in cases:
        base = run_case(package, case, {})
        bases.append(base)
        trial.comparisons.extend(compare(package, case, "base", base))
        trial.comparisons.extend(compare_int8(package, case, base))
    with put_weights(package, model) as tensors:
        trial.changed.update(tensors)
        if tensors:
            for case, base in zip(cases, bases, strict=True):
                trial.comparisons.extend(compare(package, case, "replaced", run_case(package, case, tensors), base))
    if package.points:
        with put_adapter(package, model) as tensors:
            for module, point in package.points.items():
                if point.lora_a in tensors:
                    trial.changed.add(module)
            for case, base in zip(cases, bases, strict=True):
                trial.comparisons.extend(compare(package, case, "adapter", run_case(package, case, tensors), base))
                trial.comparisons.extend(compare_rows(package, case, tensors, base))
    _judge(package, trial.comparisons)
    return trial


def _seen(package: Package, trial: _Trial) -> set[str]:
    """The modules and parameters that were changed and seen to move an output of every graph that has them."""
    seen = set(trial.changed)
    for graph in package.manifest.graphs:
        cases = {entry.case for entry in trial.comparisons if entry.graph == graph.name and entry.is_seen}
        if "adapter" not in cases:
            seen.difference_update(point.module for point in graph.points)
        if "replaced" not in cases:
            seen.difference_update(weight.name for weight in graph.replaceable)
    return seen


def _check_calls(package: Package, original: Original) -> set[str]:
    """Check that the graphs of an unproven package compute each module as often as PyTorch calls it. Numbers alone may
    agree by the smallness of what is missing. Gives the modules that could not be counted in some graph.

    Raises VerificationError: one is computed more or less often, or something else computes with its weight.
    """
    weights = read_module_weights(original.model, heads=heads_of(original.model))
    calls = count_calls(original.model, {case.graph: case.answer for case in original.references()})
    problems: list[str] = []
    uncounted: set[str] = set()
    for info in package.manifest.graphs:
        called = calls.get(info.name, Calls({}))
        graph = load(package.path / info.base_file).graph
        counted = drop_miscounted(locate(graph, weights), graph, called)
        found = {one.module for one in counted.occurrences}
        reasons: dict[str, str] = {}
        for node in counted.unplaced:
            reasons |= dict.fromkeys(node.modules, node.reason)
        for point in info.points:
            if not point.unproven or point.module in found:
                continue
            uncounted.add(point.module)
            if point.module in reasons:
                problems.append(f"graph {info.name}, {point.module}: {reasons[point.module]}")
        problems += _uncalled_weights(info, called)
    if problems:
        raise VerificationError(
            "gives the model's numbers on what was tried, and must compute every module where PyTorch does, which it "
            "does not: attach the graph as its exporter wrote it",
            path=package.path,
            problems=problems,
        )
    return uncounted


def _uncalled_weights(info: GraphInfo, called: Calls) -> list[str]:
    """Unproven whole weights of a graph whose modules PyTorch calls otherwise than once."""
    problems: list[str] = []
    for weight in info.replaceable:
        times = called.counts.get(weight.module, 0)
        if weight.unproven and not weight.has_rows and times != 1:
            problems.append(f"graph {info.name}, {weight.name}: torch calls {weight.module} {times} times")
    return problems


def _which_side(comparisons: Sequence[Comparison]) -> str:
    """What differs, as far as the comparisons tell."""
    wrong = {entry.case for entry in comparisons if not entry.agrees}
    if "base" in wrong:
        left_out = sorted({name for entry in comparisons for name in entry.left_out})
        without = f" (compared without {', '.join(left_out)})" if left_out else ""
        return (
            f"the base differs already{without}, so no adapter is at fault: this is another checkpoint than the graphs "
            "were made from, or the graphs compute something else"
        )
    if "folded" in wrong:
        return "other adapters or weights were folded in, or into another checkpoint"
    if wrong <= {"adapter", "rows"}:
        return "the base agrees, and what the adapters change does not"
    return f"what differs is {', '.join(sorted(wrong))}"


def _judge(package: Package, comparisons: list[Comparison]) -> None:
    """Raises VerificationError: an output differs by more than rounding. An adapter without effect is logged."""
    problems: list[str] = []
    for entry in comparisons:
        if not entry.agrees:
            of = f" {entry.adapter}" if entry.adapter else ""
            problems.append(
                f"graph {entry.graph}, {entry.case}{of}, output {entry.output}: differs by {entry.difference:.3g}, "
                f"and {entry.allowed:.3g} is allowed"
            )
    if problems:
        raise VerificationError(
            f"must reproduce the model in PyTorch, and does not: {_which_side(comparisons)}",
            path=package.path,
            problems=problems,
            comparisons=comparisons,
        )
    adapted = [entry for entry in comparisons if entry.case == "adapter"]
    if adapted and not any(entry.is_seen for entry in adapted):
        # Not wrong: PEFT's adapter moves nothing either, behind a last layer of zeros for example.
        logger.warning("%s: the adapter tried has no effect on any output, in PyTorch neither", package.path.name)
