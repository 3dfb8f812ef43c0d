"""A package against the PyTorch model it was made from: the base, PEFT adapters, and what that proves of its points."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onnx_lora.boundary import public
from onnx_lora.errors import VerificationError
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.frontends.source import ModelSource, Original
from onnx_lora.exporter.frontends.sources import recorded_source
from onnx_lora.exporter.intake.load import load
from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.exporter.locating.doubts import drop_miscounted
from onnx_lora.exporter.locating.locate import locate
from onnx_lora.exporter.verification.comparison import Comparison, compare, compare_int8, compare_rows, run_case
from onnx_lora.exporter.verification.quantized_reference import adopt_quantized
from onnx_lora.exporter.verification.random_adapters import peft_failures, put_adapter, put_weights
from onnx_lora.exporter.weights.torch_weights import read_module_weights
from onnx_lora.manifest import GraphInfo
from onnx_lora.package import Package

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = ["verify", "verify_original"]

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
) -> list[Comparison]:
    """Compare a package with the model it was made from, in PyTorch.

    Where random adapters are tried (no `adapter` is given) and agree, the unproven points and whole weights that they
    reach are proven, and the manifest is written anew to say so.

    checkpoint: the model's folder or hub id, which the exporter that the manifest names loads; or a source of graphs,
        as `export` takes it: `TorchModule(module, example_inputs=...)`.
    adapter: a PEFT folder that PEFT loads into the model; `tensors` is the same adapter, bound to the
        package, by the names of its inputs. Without them random adapters are tried.

    Gives one comparison for each output of each graph and case.

    Raises VerificationError: the outputs differ by more than rounding. ModelError: no such checkpoint, or PEFT cannot
    load the adapter. ExportError: a graph cannot run. MissingDependencyError: torch, PEFT, or what loads the
    checkpoint is not installed.
    """
    if isinstance(checkpoint, str | os.PathLike):
        source = recorded_source(package.manifest.source, checkpoint)
    else:
        source = checkpoint
    original = source.load_original(package)
    if adapter is not None:
        return _compare_adapter(package, original, adapter, tensors or {})
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


def _compare_adapter(
    package: Package, original: Original, adapter: str | os.PathLike[str], tensors: Mapping[str, Array]
) -> list[Comparison]:
    """The base, and one adapter that PEFT loads into the model, where it stays."""
    comparisons: list[Comparison] = []
    with peft_failures():
        import peft

        adopt_quantized(package, original.model)
        cases = original.references()
        bases = [run_case(package, case, {}) for case in cases]
        for case, base in zip(cases, bases, strict=True):
            comparisons += compare(package, case, "base", base)
        peft.PeftModel.from_pretrained(original.model, os.fspath(adapter)).eval()
    for case, base in zip(cases, bases, strict=True):
        comparisons += compare(package, case, "adapter", run_case(package, case, tensors), base)
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


def _judge(package: Package, comparisons: list[Comparison]) -> None:
    """Raises VerificationError: an output differs by more than rounding. An adapter without effect is logged."""
    problems: list[str] = []
    for entry in comparisons:
        if not entry.agrees:
            problems.append(
                f"graph {entry.graph}, {entry.case}, output {entry.output}: differs by {entry.difference:.3g}, "
                f"and {entry.allowed:.3g} is allowed"
            )
    if problems:
        raise VerificationError(
            "must reproduce the model in PyTorch, and does not", path=package.path, problems=problems
        )
    adapted = [entry for entry in comparisons if entry.case == "adapter"]
    if adapted and not any(entry.is_seen for entry in adapted):
        # Not wrong: PEFT's adapter moves nothing either, behind a last layer of zeros for example.
        logger.warning("%s: the adapter tried has no effect on any output, in PyTorch neither", package.path.name)
