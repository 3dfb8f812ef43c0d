"""A package against the PyTorch model it was made from: the base, and PEFT adapters.

It runs the package in ONNX Runtime as anybody would, with the adapter's tensors as inputs, and reads
nothing but the package and the model: no part of our own runtime can hide a mistake."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lora.boundary import public
from onnx_lora.companions import check_folder
from onnx_lora.errors import MissingDependencyError, ModelError, VerificationError
from onnx_lora.exporter.calls import Calls
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends import diffusion, genai, optimum
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.frontends.source import Reference
from onnx_lora.exporter.frontends.torch_module import reference
from onnx_lora.exporter.load import load
from onnx_lora.exporter.locate import locate
from onnx_lora.exporter.ort_check import open_graph, run_graph
from onnx_lora.exporter.quantized_reference import adopt_quantized, in_floats
from onnx_lora.kinds import Conv, Embedding
from onnx_lora.package import Package
from onnx_lora.points import Array, InjectionPoint

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Comparison", "verify", "verify_module"]

logger = logging.getLogger(__name__)

# Largest difference allowed, relative to the largest value of the output: float32 sums in another order,
# through some dozens of layers; float16 keeps three digits.
_ALLOWED = {"float32": 1e-4, "float16": 3e-2, "float64": 1e-9}

# The same for a graph as it is, where its quantized products multiply in int8. Measured against float32 on the
# same weights: 0.003 to 0.018 after two layers, 0.024 after thirty; what is wrong is off by the whole output.
_ALLOWED_INT8 = 0.25

# Outputs smaller than this are compared as if they were this large.
_SMALL = 1e-2

# What Optimum puts behind a task whose graphs have a cache.
_WITH_PAST = "-with-past"

# An adapter was seen to work when it moves some output this many times further than rounding does.
_SEEN = 100

# The random adapters of a check: ranks that differ by module, a scale that is not 1, and a delta
# large enough to be seen and small enough to leave the numbers finite in float16.
_RANKS = (2, 3, 5)
_SCALE = 0.25


@dataclass(frozen=True, slots=True)
class Comparison:
    """One output of one graph against PyTorch's.

    `case` is "base", "adapter", "rows", "replaced", or "int8": the base as it is, where the others are run in
    floats; `difference` is the largest absolute one, `allowed` how large
    it may be, and `effect` how far the adapter moved this output from the base's.
    """

    graph: str
    case: str
    output: str
    difference: float
    allowed: float
    effect: float = 0.0

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed


@public
def verify(
    package: Package,
    checkpoint: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    tensors: Mapping[str, Array] | None = None,
) -> list[Comparison]:
    """Compare a package with the checkpoint it was made from, in PyTorch.

    Where random adapters are tried (no `adapter` is given) and agree, the unproven points and whole weights that they
    reach are proven, and the manifest is written anew to say so.

    adapter: a PEFT folder that PEFT loads into the model; `tensors` is the same adapter, bound to the
        package. Without them random adapters are tried.

    Raises VerificationError: the outputs differ by more than rounding. ModelError: no such checkpoint.
    """
    if Path(checkpoint).is_dir():
        check_folder(Path(checkpoint), ModelError)
    source = package.manifest.source
    precision = source.get("precision", "fp32")
    if source.get("made_by") == "genai":
        model, task = genai.load_causal_model(checkpoint, precision=precision), source.get("task")
    elif "pipeline" in source:
        task = source.get("task")
        model = diffusion.load_pipeline(checkpoint, task=task, precision=precision)
    else:
        model, task = optimum.load_model(checkpoint, task=source.get("task"), precision=precision)
        if "task" not in source and task.endswith(_WITH_PAST) and not _has_cache(package):
            task = task.removesuffix(_WITH_PAST)
            optimum.without_cache(model)
    if adapter is None:
        comparisons, tried = _try_all(package, model, task, None)
        if package.unproven:
            uncounted = _check_calls(package, model, task)
            package.record_proof(tried & set(package.unproven) - uncounted)
        return comparisons
    with _peft_errors():
        import peft

        adopt_quantized(package, model)
        cases = _cases(package, model, task, None)
        bases = [_run(package, case, {}) for case in cases]
        comparisons = [
            entry for case, base in zip(cases, bases, strict=True) for entry in _compare(package, case, "base", base)
        ]
        peft.PeftModel.from_pretrained(model, os.fspath(adapter)).eval()
    for case, base in zip(cases, bases, strict=True):
        outputs = _run(package, case, tensors or {})
        comparisons += _compare(package, case, "adapter", outputs, base)
    return _judged(package, comparisons)


def verify_module(package: Package, model: nn.Module, task: str | None, example_inputs: Any) -> list[Comparison]:
    """Compare a package with the live torch model: base, random adapter, and a different adapter per row.

    The model is as it was afterwards; where the package quantized its weights, it keeps them as they are there.

    Raises VerificationError: they differ by more than rounding.
    """
    return _try_all(package, model, task, example_inputs)[0]


def _try_all(
    package: Package, model: nn.Module, task: str | None, example_inputs: Any
) -> tuple[list[Comparison], frozenset[str]]:
    """The comparisons, and the modules and parameters that were changed and seen to move an output of every graph that
    has them."""
    adopt_quantized(package, model)
    cases = _cases(package, model, task, example_inputs)
    comparisons: list[Comparison] = []
    bases: list[dict[str, Array]] = []
    for case in cases:
        bases.append(_run(package, case, {}))
        comparisons += _compare(package, case, "base", bases[-1])
        comparisons += _compare_int8(package, case, bases[-1])
    tried: list[str] = []
    with _random_weights(package, model) as tensors:
        tried += tensors
        for case, base in zip(cases, bases, strict=True) if tensors else ():
            comparisons += _compare(package, case, "replaced", _run(package, case, tensors), base)
    if package.points:
        with _random_adapter(package, model) as tensors:
            tried += [module for module, point in package.points.items() if point.lora_a in tensors]
            for case, base in zip(cases, bases, strict=True):
                comparisons += _compare(package, case, "adapter", _run(package, case, tensors), base)
                comparisons += _compare_rows(package, case, tensors, base)
    _judged(package, comparisons)
    blind = set[str]()
    for graph in package.manifest.graphs:
        cases_seen = {entry.case for entry in comparisons if entry.graph == graph.name and _is_seen(entry)}
        if "adapter" not in cases_seen:
            blind.update(point.module for point in graph.points)
        if "replaced" not in cases_seen:
            blind.update(weight.name for weight in graph.replaceable)
    return comparisons, frozenset(tried) - blind


def _has_cache(package: Package) -> bool:
    """Whether a graph takes what an earlier call computed."""
    files = [package.path / graph.file for graph in package.manifest.graphs]
    return any(value.name.startswith("past_key_values") for file in files for value in open_graph(file).get_inputs())


def _check_calls(package: Package, model: nn.Module, task: str | None) -> set[str]:
    """That the graphs of an unproven package compute each module as often as PyTorch calls it. Numbers alone may agree
    by the smallness of what is missing. Gives the modules that could not be counted in some graph.

    Raises VerificationError: one is computed more or less often, or something else computes with its weight.
    """
    checkpoint = Checkpoint.of_module(model, heads=heads_of(model))
    calls = count_calls(model, {case.graph: case.answer for case in _cases(package, model, task, None)})
    problems: list[str] = []
    uncounted: set[str] = set()
    for info in package.manifest.graphs:
        graph = load(package.path / info.base_file).graph
        counted = locate(graph, checkpoint).counted(graph, calls.get(info.name, Calls({})))
        found = {one.module for one in counted.linears}
        reasons = {module: stray.reason for stray in counted.strays for module in stray.modules}
        for module in (point.module for point in info.points if point.unproven):
            if module not in found:
                uncounted.add(module)
            if module not in found and module in reasons:
                problems.append(f"graph {info.name}, {module}: {reasons[module]}")
        for weight in info.replaceable:
            called = calls.get(info.name, Calls({})).counts.get(weight.module, 0)
            if weight.unproven and not weight.has_rows and called != 1:
                problems.append(f"graph {info.name}, {weight.name}: torch calls {weight.module} {called} times")
    if problems:
        raise VerificationError(
            "gives the model's numbers on what was tried, and must compute every module where PyTorch does, which it "
            "does not: attach the graph as its exporter wrote it",
            path=package.path,
            problems=problems,
        )
    return uncounted


def _cases(package: Package, model: Any, task: str | None, example_inputs: Any) -> list[Reference]:
    """Inputs and answers for every graph, by what made the package."""
    if package.manifest.source.get("made_by") == "genai":
        return genai.references(model)
    if "pipeline" in package.manifest.source:
        return diffusion.references(model)
    if task is not None:
        return optimum.references(model, task)
    outputs = open_graph(package.path / package.graph().file).get_outputs()
    return [reference(model.eval(), [value.name for value in outputs], example_inputs)]


def _judged(package: Package, comparisons: list[Comparison]) -> list[Comparison]:
    wrong = [entry for entry in comparisons if not entry.agrees]
    if wrong:
        raise VerificationError(
            "must reproduce the model in PyTorch, and does not",
            path=package.path,
            problems=[
                f"graph {entry.graph}, {entry.case}, output {entry.output}: differs by {entry.difference:.3g}, "
                f"and {entry.allowed:.3g} is allowed"
                for entry in wrong
            ],
        )
    adapted = [entry for entry in comparisons if entry.case == "adapter"]
    if adapted and not any(_is_seen(entry) for entry in adapted):
        # Not wrong: PEFT's adapter moves nothing either, behind a last layer of zeros for example.
        logger.warning("%s: the adapter tried has no effect on any output, in PyTorch neither", package.path.name)
    return comparisons


def _is_seen(entry: Comparison) -> bool:
    """Whether the adapter moved an output much further than rounding does."""
    return entry.effect > _SEEN * entry.difference


def _run(
    package: Package, case: Reference, tensors: Mapping[str, Array], *, as_it_is: bool = False
) -> dict[str, Array]:
    file = package.path / package.graph(case.graph).file
    session = open_graph(file, None if as_it_is else in_floats(file))
    inputs = [value.name for value in session.get_inputs()]
    optional = {value.name for value in session.get_overridable_initializers()}
    feeds = {name: value for name, value in case.feeds(inputs).items() if name in inputs}
    inputs_of_adapter = package.graph(case.graph).inputs(tensors)
    return run_graph(session, file, feeds | {key: value for key, value in inputs_of_adapter.items() if key in optional})


def _compare(
    package: Package, case: Reference, label: str, outputs: Mapping[str, Array], base: Mapping[str, Array] | None = None
) -> Iterator[Comparison]:
    with _run_errors(label):
        expected = case.answer()
    missing = sorted(set(outputs) - set(expected))
    if missing:
        raise VerificationError(
            f"graph {case.graph} has outputs that the model does not give: {', '.join(missing)}", path=package.path
        )
    for name, value in outputs.items():
        if value.shape != expected[name].shape:
            yield Comparison(case.graph, label, name, float("inf"), 0.0)
            continue
        if not value.size:
            continue
        effect = 0.0 if base is None or base[name].shape != value.shape else _largest(value, base[name])
        allowed = _allowed(expected[name])
        yield Comparison(case.graph, label, name, _largest(value, expected[name]), allowed, effect)


def _compare_int8(package: Package, case: Reference, base: Mapping[str, Array]) -> Iterator[Comparison]:
    """That int8 arithmetic loses no more than it must."""
    if in_floats(package.path / package.graph(case.graph).file) is None:
        return
    for name, value in _run(package, case, {}, as_it_is=True).items():
        if value.size:
            allowed = _ALLOWED_INT8 * max(_SMALL, float(np.abs(base[name]).max()))
            yield Comparison(case.graph, "int8", name, _largest(value, base[name]), allowed)


def _compare_rows(
    package: Package, case: Reference, tensors: Mapping[str, Array], base: Mapping[str, Array]
) -> Iterator[Comparison]:
    """Every other row under the adapter: each must be what it is alone."""
    graph = package.graph(case.graph)
    points = [point for point in graph.points if point.per_row and point.lora_a in tensors]
    count = _batch_size(package, case)
    if not points or count < 2:
        return
    names = [name for point in points for name in (point.lora_a, point.lora_b, point.dora_scale)]
    own = {name: tensors[name] for name in names if name in tensors}
    adapted = np.arange(count) % 2 == 1
    rows = {
        name: np.where(adapted[:, None, None], value, np.full_like(value, name.endswith(".dora_scale")))
        for name, value in own.items()
    }
    alone, mixed = _run(package, case, own), _run(package, case, rows)
    for name, value in mixed.items():
        if value.ndim and value.shape[0] == count and value.shape == base[name].shape and value.size:
            choice = adapted.reshape(-1, *[1] * (value.ndim - 1))
            expected = np.where(choice, alone[name], base[name])
            yield Comparison(case.graph, "rows", name, _largest(value, expected), _allowed(expected))


def _batch_size(package: Package, case: Reference) -> int:
    """What a graph whose points have rows knows for certain: the first axis of its first input with two."""
    names = [value.name for value in open_graph(package.path / package.graph(case.graph).file).get_inputs()]
    return next((len(value) for value in case.feeds(names).values() if value.ndim > 1), 0)


@contextmanager
def _random_weights(package: Package, model: Any) -> Iterator[dict[str, Array]]:
    """Other values for the replaceable weights, in the model and as graph inputs: as if an adapter brought them.

    Weights that the model shares between modules stay out: changing one here would change the other.
    """
    import torch

    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    parameters = {name: parameter for name, parameter in model.named_parameters() if shared[id(parameter)] == 1}
    tensors: dict[str, Array] = {}
    before: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    try:
        for name, weight in package.replaceable.items():
            if name in parameters:
                values = parameters[name].data
                before[name] = values.clone()
                noise = torch.rand(values.shape, generator=generator) - 0.5
                values += noise.to(values.dtype) * max(float(values.abs().max()), _SMALL)
                tensors[name] = weight.to_graph(values.float().numpy().astype(weight.dtype))
        yield tensors
    finally:
        for name, values in before.items():
            parameters[name].data.copy_(values)


def _allowed(expected: Array) -> float:
    return _ALLOWED.get(expected.dtype.name, 0.0) * max(_SMALL, float(np.abs(expected).max()))


def _largest(actual: Array, expected: Array) -> float:
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


@contextmanager
def _random_adapter(package: Package, model: Any) -> Iterator[dict[str, Array]]:
    """Let PEFT put a random adapter on every point's module; gives its tensors as graph inputs."""
    with _peft_errors():
        import peft
        import torch

    modules = list(package.points)
    # Whole names: PEFT takes a plain name for a suffix, and every pattern for a regular expression.
    ranks = {
        f"^{re.escape(name)}": _RANKS[index % len(_RANKS)] * _groups(package.points[name])
        for index, name in enumerate(modules)
    }
    config = peft.LoraConfig(
        r=_RANKS[0],
        lora_alpha=_SCALE,
        target_modules="|".join(re.escape(name) for name in modules),
        rank_pattern=ranks,
        alpha_pattern={name: rank * _SCALE for name, rank in ranks.items()},
        init_lora_weights=False,
        use_dora=bool(modules) and package.dora >= set(modules),
    )
    with torch.random.fork_rng(devices=[]), _peft_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of convolutions in groups
        torch.manual_seed(0)
        tuned = peft.tuners.lora.LoraModel(model, config, "default")
        for layer in tuned.modules() if config.use_dora else ():
            for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
                magnitude.weight.data *= 1 + _SCALE * torch.rand_like(magnitude.weight)
    model.eval()
    tensors: dict[str, Array] = {}
    try:
        for name, module in model.named_modules():
            if name in package.points:
                tensors.update(_tensors_of(module, package.points[name]))
        yield tensors
    finally:
        tuned.unload()


def _groups(point: InjectionPoint) -> int:
    return point.kind.groups if isinstance(point.kind, Conv) else 1


def _tensors_of(layer: Any, point: InjectionPoint) -> dict[str, Array]:
    """A layer of PEFT's as graph inputs, written down anew: nothing here is shared with what reads adapters."""
    if isinstance(point.kind, Embedding):
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b = (factor.detach().double().flatten(1).numpy() for factor in (a, b))
    if (groups := _groups(point)) > 1:
        outputs, rank = len(b) // groups, b.shape[1]
        blocks = np.zeros((len(b), rank * groups))
        for group in range(groups):
            rows = slice(group * outputs, (group + 1) * outputs)
            blocks[rows, group * rank : (group + 1) * rank] = b[rows]
        b = blocks
    b = b * layer.scaling["default"]
    tensors = {point.lora_a: a.T[None], point.lora_b: b.T[None]}
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double().numpy().reshape(-1)
        weight = layer.get_base_layer().weight.detach().double().flatten(1).numpy()
        by_output = weight.T if isinstance(point.kind, Embedding) or getattr(layer, "fan_in_fan_out", False) else weight
        tensors[point.dora_scale] = (magnitude / np.linalg.norm(by_output + b @ a, axis=1))[None, None]
    return {name: np.ascontiguousarray(value).astype(point.dtype) for name, value in tensors.items()}


@contextmanager
def _run_errors(case: str) -> Iterator[None]:
    """PyTorch's exceptions as ours, where PEFT's layers take the place of a model's own."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if case not in ("adapter", "rows"):
            raise
        raise ModelError(
            f"PyTorch cannot run the model with PEFT's layers at all of these points: {error}; choose other targets, "
            "or do without the verification"
        ) from error


@contextmanager
def _peft_errors() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"verifying needs {error.name}: pip install 'onnx-lora[export,cpu]'") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"PEFT cannot load the adapter into the model: {error}") from error
