"""What each command finds out, as data: numbers, sizes in bytes, names and lists. `--json` prints these fields, and
`wording.py` makes the text for people of them. It knows packages and adapters as data, and prints nothing.

docs/json.md and docs/results.schema.json are made of these classes and of what stands below each field."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from onnx_lora.errors import OnnxLoraError, VerificationError

if TYPE_CHECKING:
    from onnx_lora.adapters import Adapter, BoundAdapter, Converted, ConvertedFolder
    from onnx_lora.demo import DemoResult
    from onnx_lora.demo_text import WriterResult
    from onnx_lora.exporter import Comparison, TextComparison
    from onnx_lora.folded import FoldedModel
    from onnx_lora.package import Package
    from onnx_lora.runtime import Requantize

__all__ = [
    "AdapterResult",
    "BatchEntry",
    "BatchResult",
    "ConvertResult",
    "Count",
    "CoverageResult",
    "DemoRun",
    "Doubt",
    "ErrorResult",
    "FoldOnly",
    "FoldResult",
    "FoldedAdapter",
    "FoldedInAdapter",
    "FoldedResult",
    "GenerateResult",
    "GeneratedText",
    "InspectedAdapter",
    "ModuleSize",
    "OutputComparison",
    "PackageResult",
    "ReplaceableWeight",
    "RoundedModule",
    "RunOutput",
    "RunResult",
    "ScaleCount",
    "TextAgreement",
    "UnplacedNode",
    "VerifyResult",
    "WholeWeightValue",
    "as_json",
]


@dataclass(frozen=True)
class UnplacedNode:
    """A node with weights that got no point."""

    graph: str
    """The graph that it is in."""

    node: str
    """Its name, or what stands for it."""

    reason: str
    """Why it got none."""


@dataclass(frozen=True)
class Doubt:
    """Modules and parameters of which a graph may compute something else."""

    reason: str
    """Why that may be."""

    names: Sequence[str]
    """The modules and parameters."""


@dataclass(frozen=True)
class ReplaceableWeight:
    """A whole weight that an adapter may replace."""

    name: str
    """The parameter's name in PyTorch."""

    shape: Sequence[int]
    """Its shape in PyTorch."""


@dataclass(frozen=True)
class ModuleSize:
    """A module with an injection point."""

    module: str
    """Its name."""

    inputs: int
    """The length of the rows of A."""

    outputs: int
    """The length of the columns of B."""

    dtype: str
    """The type of A and B."""


@dataclass(frozen=True)
class OutputComparison:
    """One output of one graph against PyTorch's."""

    graph: str
    """The graph's name."""

    case: str
    """What was run: "base"; "adapter" (on all rows); "rows" (on every other row); "replaced" (whole weights); "int8" (a
    quantized base as it is, against itself in float)."""

    adapter: str
    """The adapter's name; empty where none was named."""

    output: str
    """The output's name."""

    difference: float | None
    """The largest absolute difference; null where it is no finite number, or where the shapes differ."""

    allowed: float
    """How large it may be."""

    agrees: bool
    """Whether it is no larger."""


@dataclass(frozen=True)
class TextAgreement:
    """The package and the float model in PyTorch on the user's own texts."""

    adapter: str
    """The adapter's name; empty for the base."""

    answers: int
    """How many answers were compared: next tokens of a decoder, labels of a classifier."""

    agreement: float
    """The share of them for which both say the same, from 0 to 1."""

    loss_float: float | None
    """The float model's mean cross-entropy on the texts, nats a token; null for labels."""

    loss_package: float | None
    """The package's."""


@dataclass(frozen=True)
class VerifyResult:
    """What a comparison with PyTorch found."""

    agrees: bool
    """Whether every output agrees."""

    outputs: Sequence[OutputComparison]
    """Every comparison that was made."""

    left_out: Mapping[str, Sequence[str]]
    """The model's inputs that a graph has not, by graph: PyTorch's model was not given them either."""

    proven: Sequence[str]
    """Modules and parameters that were unproven before, and are proven by this comparison."""

    unproven: Sequence[Doubt]
    """What stays unproven."""

    texts: Sequence[TextAgreement]
    """The base and each adapter on the texts of `--text`; empty without them."""

    @staticmethod
    def of(
        comparisons: Sequence[Comparison],
        before: Package | None = None,
        now: Package | None = None,
        texts: Sequence[TextComparison] = (),
    ) -> VerifyResult:
        """`before`, `now`: the package before the comparison, and after; None of a folded model."""
        outputs: list[OutputComparison] = []
        for entry in comparisons:
            difference = entry.difference if math.isfinite(entry.difference) else None
            outputs.append(
                OutputComparison(
                    entry.graph, entry.case, entry.adapter, entry.output, difference, entry.allowed, entry.agrees
                )
            )
        return VerifyResult(
            agrees=all(entry.agrees for entry in comparisons),
            outputs=outputs,
            left_out={entry.graph: list(entry.left_out) for entry in comparisons if entry.left_out},
            proven=sorted(set(before.unproven) - set(now.unproven)) if before and now else [],
            unproven=_doubts(now.unproven) if now else [],
            texts=[
                TextAgreement(one.adapter, one.answers, one.agreement, one.loss_float, one.loss_package)
                for one in texts
            ],
        )


@dataclass(frozen=True)
class PackageResult:
    """What a package offers to adapters, and what of its graphs it does not."""

    package: str
    """Its folder, as it was given."""

    made_from: Mapping[str, str]
    """What it was made from, and by which exporter, by the manifest's names."""

    graphs: Sequence[str]
    """The names of its graphs."""

    points: int
    """How many modules have an injection point."""

    points_by_name: Mapping[str, int]
    """How many of them have the same last part of their name."""

    modules: Sequence[ModuleSize]
    """The modules with a point."""

    whole_batch_only: Sequence[str]
    """Modules with a point that takes one adapter for a whole batch, and none for single rows."""

    replaceable: Sequence[ReplaceableWeight]
    """The whole weights that adapters may replace."""

    without_point: Sequence[UnplacedNode]
    """Nodes with weights that no adapter can reach."""

    not_targeted: Sequence[str]
    """Modules that could have a point, and were not asked for."""

    unproven: Sequence[Doubt]
    """Points and whole weights that adapters are refused at, unless they are allowed."""

    untrained: Sequence[str] | None
    """Parameters that were random numbers at the export, because the checkpoint holds none: adapters must bring them.
    Null where the package does not say."""

    size_bytes: int
    """The size of its graphs and weights."""

    fingerprint: str
    """The SHA-256 of its base weights."""

    verification: VerifyResult | None
    """The comparison with PyTorch that `export` ended with; null of other commands, and of `--no-verify`."""

    @staticmethod
    def of(package: Package, comparisons: Sequence[Comparison] | None = None) -> PackageResult:
        """`comparisons`: of the verification that the export ended with, where it did."""
        without_point: list[UnplacedNode] = []
        not_targeted: set[str] = set()
        for graph in package.manifest.graphs:
            without_point.extend(UnplacedNode(graph.name, entry.node, entry.reason) for entry in graph.unplaced)
            not_targeted.update(graph.untargeted)
        points = list(package.points.values())
        return PackageResult(
            package=str(package.path),
            made_from=dict(package.manifest.source),
            graphs=[graph.name for graph in package.manifest.graphs],
            points=len(points),
            points_by_name=dict(Counter(point.module.rpartition(".")[2] for point in points)),
            modules=[ModuleSize(point.module, point.in_features, point.out_features, point.dtype) for point in points],
            whole_batch_only=[point.module for point in points if not point.per_row],
            replaceable=[ReplaceableWeight(name, weight.shape) for name, weight in package.replaceable.items()],
            without_point=without_point,
            not_targeted=sorted(not_targeted),
            unproven=_doubts(package.unproven),
            untrained=package.manifest.untrained,
            size_bytes=_count_bytes(package),
            fingerprint=package.fingerprint,
            verification=None if comparisons is None else VerifyResult.of(comparisons, package, package),
        )


@dataclass(frozen=True)
class Count:
    """How many modules have a rank."""

    rank: int
    """The rank."""

    modules: int
    """How many modules have it."""


@dataclass(frozen=True)
class ScaleCount:
    """How many modules have a scale."""

    scale: float
    """The scale, alpha / r or as the method has it."""

    modules: int
    """How many modules have it."""


@dataclass(frozen=True)
class WholeWeightValue:
    """A whole weight that an adapter brings."""

    name: str
    """The parameter's name in PyTorch."""

    shape: Sequence[int]
    """Its shape."""

    operation: Literal["set", "add", "multiply"]
    """What is done to the base's own value with it."""


@dataclass(frozen=True)
class AdapterResult:
    """What an adapter's files hold."""

    adapter: str
    """Its folder or file, as it was given."""

    format: str
    """The format of its files."""

    method: str
    """The method that it was trained with."""

    base_model: str
    """The base that it names; empty where it names none."""

    modules: int
    """How many modules it changes."""

    ranks: Sequence[Count]
    """The ranks of its pairs of factors, the lowest first."""

    scales: Sequence[ScaleCount]
    """Their scales, the lowest first."""

    other_changes: Mapping[str, int]
    """Modules that are changed otherwise than by a pair of factors: how many by each method."""

    whole_weights: Sequence[WholeWeightValue]
    """The whole weights that it brings."""

    size_bytes: int
    """The size of its numbers in memory."""

    notes: Sequence[str]
    """What a user should know."""

    @staticmethod
    def of(adapter: Adapter) -> AdapterResult:
        deltas = adapter.deltas.values()
        size = sum(delta.a.nbytes + delta.b.nbytes for delta in deltas)
        weights: list[WholeWeightValue] = []
        for name, entry in adapter.replacements.items():
            size += entry.value.nbytes
            weights.append(WholeWeightValue(name, entry.value.shape, entry.operation))
        ranks = sorted(Counter(delta.rank for delta in deltas).items())
        scales = sorted(Counter(float(delta.scale) for delta in deltas).items())
        return AdapterResult(
            adapter=adapter.origin.path,
            format=adapter.origin.format,
            method=adapter.origin.method,
            base_model=adapter.origin.base_model,
            modules=len({*adapter.deltas, *adapter.changes}),
            ranks=[Count(rank, modules) for rank, modules in ranks],
            scales=[ScaleCount(scale, modules) for scale, modules in scales],
            other_changes=dict(Counter(change.method for change in adapter.changes.values())),
            whole_weights=weights,
            size_bytes=size,
            notes=list(adapter.notes),
        )


@dataclass(frozen=True)
class FoldOnly:
    """A module that an adapter changes only where it is folded in."""

    module: str
    """The module's name."""

    reason: str
    """Why it cannot run apart from the weights."""


@dataclass(frozen=True)
class CoverageResult:
    """What an adapter does to a package."""

    points: int
    """How many modules of the package have a point."""

    applied: Sequence[str]
    """Modules that it changes."""

    at_base: Sequence[str]
    """Modules with a point that it leaves as they are."""

    replaced: Sequence[str]
    """Parameters that it replaces."""

    without_effect: Sequence[str]
    """Modules of `applied` whose B is zero."""

    fold_only: Sequence[FoldOnly]
    """Modules that it changes only where it is folded in."""

    size_bytes: int
    """The size of the tensors that it feeds."""

    base_size_bytes: int
    """The size of the package's graphs and weights."""

    notes: Sequence[str]
    """What a user should know."""

    @staticmethod
    def of(bound: BoundAdapter, package: Package) -> CoverageResult:
        coverage = bound.coverage
        return CoverageResult(
            points=len(package.points),
            applied=list(coverage.applied),
            at_base=list(coverage.at_base),
            replaced=list(coverage.replaced),
            without_effect=list(coverage.silent),
            fold_only=[FoldOnly(module, reason) for module, reason in coverage.fold_only.items()],
            size_bytes=sum(value.nbytes for value in bound.tensors.values()),
            base_size_bytes=_count_bytes(package),
            notes=list(coverage.notes),
        )


@dataclass(frozen=True)
class InspectedAdapter:
    """An adapter, and what it does to a package."""

    adapter: AdapterResult
    """What its files hold."""

    coverage: CoverageResult | None
    """What it does to the package of `--package`; null where none was given."""

    effect: Mapping[str, float]
    """How far it moves each weight, ‖ΔW‖ / ‖W0‖, by module; empty without `--plot`."""

    written: str | None
    """The picture; null without `--plot`."""


@dataclass(frozen=True)
class FoldedInAdapter:
    """An adapter that lies in a folded model's weights."""

    adapter: str
    """Its name."""

    weight: float
    """What it was multiplied with."""

    groups: Mapping[str, float]
    """What the modules of some groups were multiplied with instead."""

    method: str
    """The method that it was trained with."""

    sha256: str
    """The SHA-256 of its weight file."""


@dataclass(frozen=True)
class FoldedResult:
    """What a folded model was made of."""

    model: str
    """Its folder."""

    graphs: Sequence[str]
    """The names of its graphs."""

    made_from: Mapping[str, str]
    """What its package was made from, by the manifest's names."""

    fingerprint: str
    """The package's: the SHA-256 of its base weights."""

    adapters: Sequence[FoldedInAdapter]
    """What was folded in."""

    @staticmethod
    def of(model: FoldedModel) -> FoldedResult:
        adapters = [
            FoldedInAdapter(one.name, one.weight, dict(one.groups), one.method, one.sha256) for one in model.adapters
        ]
        return FoldedResult(
            str(model.path), list(model.graphs.values()), dict(model.source), model.fingerprint, adapters
        )


@dataclass(frozen=True)
class ConvertResult:
    """What was written of an adapter, or of a blend."""

    written: str
    """The file or folder."""

    format: str
    """The format it is in."""

    adapter: AdapterResult | None
    """What the adapter's files held; null of a blend."""

    coverage: CoverageResult | None
    """What it does to the package of `--package`; null where none was given."""


@dataclass(frozen=True)
class BatchEntry:
    """What became of one adapter of many."""

    adapter: str
    """Its folder or file."""

    chosen: str | None
    """Which one there, where that holds several; null where it holds one."""

    output: str
    """Its output, whether it is there or not."""

    state: Literal["written", "up to date", "failed"]
    """"up to date": an earlier run wrote it from the same bytes, for the same package, and it is whole."""

    sha256: str | None
    """Of the output: of a file's bytes, or of a folder's files. Null where it failed."""

    size_bytes: int | None
    """The size of the output; null where it failed."""

    coverage: CoverageResult | None
    """What it does to the package of `--package`; null where none was given, and where it failed."""

    notes: Sequence[str]
    """What a user should know."""

    error: ErrorResult | None
    """Why it failed; null where it did not."""

    keeps_older: bool
    """Whether it failed, and an output that an earlier run wrote is still there."""

    @staticmethod
    def of(converted: Converted, package: Package | None) -> BatchEntry:
        effect, coverage = converted.effect, None
        if effect is not None and package is not None:
            coverage = CoverageResult(
                points=len(package.points),
                applied=effect.applied,
                at_base=effect.at_base,
                replaced=effect.replaced,
                without_effect=effect.silent,
                fold_only=[FoldOnly(module, reason) for module, reason in effect.fold_only.items()],
                size_bytes=effect.size_bytes,
                base_size_bytes=_count_bytes(package),
                notes=converted.notes,
            )
        return BatchEntry(
            adapter=str(converted.source),
            chosen=converted.chosen,
            output=str(converted.out),
            state=converted.state,
            sha256=converted.sha256,
            size_bytes=converted.size_bytes,
            coverage=coverage,
            notes=converted.notes,
            error=None if converted.error is None else ErrorResult.of(converted.error),
            keeps_older=converted.keeps_older,
        )


@dataclass(frozen=True)
class BatchResult:
    """What became of every adapter in a folder."""

    folder: str
    """The folder."""

    format: str
    """The format of the outputs."""

    written: int
    """How many were written now."""

    up_to_date: int
    """How many were left alone."""

    failed: int
    """How many failed."""

    adapters: Sequence[BatchEntry]
    """All of them, in the order of their places."""

    passed_over: Mapping[str, str]
    """What in the folder is no adapter: what it is, by its place."""

    left_over: Sequence[str]
    """Outputs of earlier runs whose adapter is gone. They stay."""

    exit_code: int
    """What the command ends with: 0; else the smallest of the errors'."""

    @staticmethod
    def of(folder: str | PathLike[str], format: str, done: ConvertedFolder, package: Package | None) -> BatchResult:
        entries = [BatchEntry.of(converted, package) for converted in done.adapters]
        states = Counter(entry.state for entry in entries)
        codes = [entry.error.exit_code for entry in entries if entry.error is not None]
        return BatchResult(
            folder=str(folder),
            format=format,
            written=states["written"],
            up_to_date=states["up to date"],
            failed=states["failed"],
            adapters=entries,
            passed_over=done.passed_over,
            left_over=[str(output) for output in done.left_over],
            exit_code=min(codes, default=0),
        )


@dataclass(frozen=True)
class RunOutput:
    """An output of a graph."""

    name: str
    """The output's name."""

    shape: Sequence[int]
    """Its shape."""

    dtype: str
    """Its type, as numpy calls it."""


@dataclass(frozen=True)
class RunResult:
    """What one run gave."""

    outputs: Sequence[RunOutput]
    """The outputs, in the graph's order."""

    written: str
    """The `.npz` file that holds them."""


@dataclass(frozen=True)
class FoldedAdapter:
    """An adapter that was folded in."""

    adapter: str
    """Its name."""

    weight: float
    """What it was multiplied with."""

    notes: Sequence[str]
    """What a user should know of it."""


@dataclass(frozen=True)
class RoundedModule:
    """What rounding a folded weight to its few bits cost, as ratios of Frobenius norms."""

    module: str
    """The module's name."""

    error_of_weight: float
    """The error to the folded weight."""

    error_of_change: float
    """How far the change that arrived is from the adapter's own, to that."""


@dataclass(frozen=True)
class FoldResult:
    """A folded model."""

    written: str
    """Its folder."""

    adapters: Sequence[FoldedAdapter]
    """What was folded in."""

    rounding: Sequence[RoundedModule]
    """Quantized weights that were rounded again, the worst first; empty without `--requantize`."""

    @staticmethod
    def of(
        written: str | PathLike[str], parts: Iterable[tuple[BoundAdapter, float]], requantize: Requantize | None
    ) -> FoldResult:
        """`requantize`: the permission that the folding used, with what that cost."""
        rounding: list[RoundedModule] = []
        if requantize is not None:
            for module, cost in requantize.rounding.items():
                rounding.append(RoundedModule(module, cost.of_weight, cost.of_change))
        return FoldResult(
            written=str(written),
            adapters=[FoldedAdapter(bound.name, weight, list(bound.coverage.notes)) for bound, weight in parts],
            rounding=sorted(rounding, key=lambda entry: entry.error_of_change, reverse=True),
        )


@dataclass(frozen=True)
class GeneratedText:
    """What was written behind one prompt."""

    prompt: str
    """The prompt."""

    text: str
    """The text behind it."""

    tokens: Sequence[int]
    """The text's tokens."""

    prompt_tokens: int
    """How many tokens the prompt has."""

    reason: str | None
    """Why the text ends there."""


@dataclass(frozen=True)
class GenerateResult:
    """The texts behind prompts."""

    generations: Sequence[GeneratedText]
    """A text for each prompt."""

    tokens: int
    """How many were written, over all rows."""

    first_token_seconds: float
    """Seconds until the first."""

    tokens_per_second: float
    """After the first."""


@dataclass(frozen=True)
class DemoRun:
    """Both parts of the demo."""

    tasks: DemoResult
    """Four tasks on one small model."""

    writer: WriterResult
    """One text, continued under four adapters."""


@dataclass(frozen=True)
class ErrorResult:
    """Why a command did not do what it was asked."""

    error: str
    """The error's class, as `onnx_lora.errors` has it; `UsageError`; or `Interrupted`."""

    message: str
    """What must hold, what was found, and what to do."""

    path: str | None
    """The file or folder that it is about; null where it is about none."""

    problems: Sequence[str]
    """Single problems, where there are several."""

    exit_code: int
    """What the command ends with."""

    verification: VerifyResult | None = None
    """The numbers of a verification that failed; null of other errors."""

    @staticmethod
    def of(error: OnnxLoraError) -> ErrorResult:
        numbers = None
        if isinstance(error, VerificationError) and error.comparisons:
            numbers = VerifyResult.of(error.comparisons)
        problems = list(error.problems)
        return ErrorResult(type(error).__name__, error.message, error.path, problems, error.exit_code, numbers)


def as_json(result: Any) -> Any:
    """A result as JSON has it: objects, lists, texts, numbers; what is no finite number is null."""
    if is_dataclass(result) and not isinstance(result, type):
        return {field.name: as_json(getattr(result, field.name)) for field in fields(result)}
    if isinstance(result, Mapping):
        return {str(name): as_json(value) for name, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [as_json(value) for value in result]
    if isinstance(result, float):
        return result if math.isfinite(result) else None
    return result


def _doubts(doubts: Mapping[str, str]) -> list[Doubt]:
    """The names of each reason, from the reason of each name."""
    names: dict[str, list[str]] = {}
    for name, reason in doubts.items():
        names.setdefault(reason, []).append(name)
    return [Doubt(reason, own) for reason, own in names.items()]


def _count_bytes(package: Package) -> int:
    """The size of a package's graphs and weights, in bytes."""
    files: set[str] = set()
    for graph in package.manifest.graphs:
        files.update([graph.file, graph.base_file])
        for point in graph.points:
            files.update(part.stored.file for part in point.parts)
    return sum((package.path / file).stat().st_size for file in files)
