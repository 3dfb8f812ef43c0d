"""Compares one graph of a package with PyTorch's answer: it runs the graph in ONNX Runtime, and measures how far its
outputs are from PyTorch's.

It runs the graph as anybody would, with an adapter's tensors as inputs, and uses no part of our own runtime, which
could hide a mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.errors import ModelError, VerificationError
from onnx_lora.exporter.ort_check import open_graph, run_graph
from onnx_lora.exporter.verification.float_products import rewrite_in_floats

if TYPE_CHECKING:
    from onnx_lora.exporter.frontends.source import Reference
    from onnx_lora.package import Package
    from onnx_lora.points import Array

__all__ = ["SMALL", "Comparison", "compare", "compare_int8", "compare_rows", "run_case"]

# Largest difference allowed, relative to the largest value of the output: float32 sums in another order,
# through some dozens of layers; float16 keeps three digits.
_ALLOWED = {"float32": 1e-4, "float16": 3e-2, "float64": 1e-9}

# The same for a graph as it is, where its quantized products multiply in int8. Differences from float32 on the same
# weights were 0.003 to 0.018 after two layers, and 0.024 after thirty; a wrong graph is off by the whole output.
_ALLOWED_INT8 = 0.25

# Outputs smaller than this are compared as if they were this large.
SMALL = 1e-2

# An adapter is seen to work where it moves an output this many times further than rounding does.
_SEEN = 100


@dataclass(frozen=True, slots=True)
class Comparison:
    """One output of one graph against PyTorch's.

    `case`: what was run: "base", "adapter", "rows" (an adapter on every other row), "replaced" (whole weights), or
        "int8": the base as it is, where quantized products are multiplied in floats in all other cases.
    `difference`: the largest absolute difference; `allowed`: how large it may be.
    `effect`: how far the adapter moved this output from the base's.
    `left_out`: the model's inputs that the graph has not; PyTorch's model was not given them either.
    `adapter`: the adapter's name, where several were tried one by one.
    """

    graph: str
    case: str
    output: str
    difference: float
    allowed: float
    effect: float = 0.0
    left_out: tuple[str, ...] = ()
    adapter: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the output differs by no more than rounding."""
        return self.difference <= self.allowed

    @property
    def is_seen(self) -> bool:
        """Whether the adapter moved the output much further than rounding does."""
        return self.effect > _SEEN * self.difference


def run_case(
    package: Package, case: Reference, tensors: Mapping[str, Array], *, as_it_is: bool = False
) -> dict[str, Array]:
    """The outputs of a case's graph, by name. `tensors`: an adapter's, by the graph's names of its inputs.
    `as_it_is`: quantized products multiply as the graph says, and not in float32.

    Raises ExportError: the graph cannot run.
    """
    info = package.graph(case.graph)
    file = package.path / info.file
    model = None if as_it_is else rewrite_in_floats(file)
    session = open_graph(file, model)
    inputs = [value.name for value in session.get_inputs()]
    optional = {value.name for value in session.get_overridable_initializers()}
    feeds: dict[str, Array] = {}
    for name, value in case.feeds(inputs).items():
        if name in inputs:
            feeds[name] = value
    for name, value in info.inputs(tensors).items():
        if name in optional:
            feeds[name] = value
    return run_graph(session, file, feeds)


def compare(
    package: Package, case: Reference, label: str, outputs: Mapping[str, Array], base: Mapping[str, Array] | None = None
) -> Iterator[Comparison]:
    """Every output of a graph against PyTorch's answer. `label` becomes the comparison's `case`; `base`: the outputs
    without the adapter.

    Raises VerificationError: the graph has outputs that the model does not give. ModelError: PyTorch cannot run the
    model with PEFT's layers.
    """
    with _run_failures(label):
        expected = case.answer()
    missing = sorted(set(outputs) - set(expected))
    if missing:
        raise VerificationError(
            f"graph {case.graph} has outputs that the model does not give: {', '.join(missing)}", path=package.path
        )
    for name, value in outputs.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            yield Comparison(case.graph, label, name, float("inf"), 0.0, left_out=case.dropped)
            continue
        if not value.size:
            continue
        effect = 0.0
        if base is not None and base[name].shape == value.shape:
            effect = _largest(value, base[name])
        difference = _largest(value, wanted)
        yield Comparison(case.graph, label, name, difference, _allowed(wanted), effect, case.dropped)


def compare_int8(package: Package, case: Reference, base: Mapping[str, Array]) -> Iterator[Comparison]:
    """Compare a graph that multiplies in int8 with itself in float arithmetic, whose outputs are `base`. Gives nothing
    for a graph without such products."""
    file = package.path / package.graph(case.graph).file
    if rewrite_in_floats(file) is None:
        return
    for name, value in run_case(package, case, {}, as_it_is=True).items():
        if value.size:
            allowed = _ALLOWED_INT8 * _size_of(base[name])
            yield Comparison(case.graph, "int8", name, _largest(value, base[name]), allowed)


def compare_rows(
    package: Package, case: Reference, tensors: Mapping[str, Array], base: Mapping[str, Array]
) -> Iterator[Comparison]:
    """Run every other row of the batch under the adapter: each row must be what it is when all rows have its adapter.
    `base`: the outputs without the adapter."""
    count = _batch_size(package, case)
    own = _tensors_by_row(package, case, tensors)
    if not own or count < 2:
        return
    adapted = np.arange(count) % 2 == 1
    rows: dict[str, Array] = {}
    for name, value in own.items():
        nothing = np.full_like(value, name.endswith(".dora_scale"))  # a scale of one, factors of zero
        rows[name] = np.where(adapted[:, None, None], value, nothing)
    alone = run_case(package, case, own)
    for name, value in run_case(package, case, rows).items():
        has_rows = value.ndim > 0 and value.shape[0] == count and value.shape == base[name].shape
        if has_rows and value.size:
            choice = adapted.reshape(-1, *[1] * (value.ndim - 1))
            expected = np.where(choice, alone[name], base[name])
            difference = _largest(value, expected)
            yield Comparison(case.graph, "rows", name, difference, _allowed(expected))


def _tensors_by_row(package: Package, case: Reference, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The adapter's tensors of points that take another adapter for each row of the batch."""
    found: dict[str, Array] = {}
    for point in package.graph(case.graph).points:
        if not point.per_row or point.lora_a not in tensors:
            continue
        for name in (point.lora_a, point.lora_b, point.dora_scale):
            if name in tensors:
                found[name] = tensors[name]
    return found


def _batch_size(package: Package, case: Reference) -> int:
    """The length of the first axis of the first input that has two axes or more: the batch, where a graph's points take
    rows."""
    file = package.path / package.graph(case.graph).file
    names = [value.name for value in open_graph(file).get_inputs()]
    for value in case.feeds(names).values():
        if value.ndim > 1:
            return len(value)
    return 0


def _allowed(expected: Array) -> float:
    """The largest difference that rounding in the type of an output explains."""
    return _ALLOWED.get(expected.dtype.name, 0.0) * _size_of(expected)


def _size_of(output: Array) -> float:
    """The largest absolute value of an output, relative to which differences are allowed."""
    return max(SMALL, float(np.abs(output).max()))


def _largest(actual: Array, expected: Array) -> float:
    """The largest absolute difference; infinite where one is no number."""
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    if not np.isfinite(difference).all():
        return float("inf")
    return float(difference.max())


@contextmanager
def _run_failures(label: str) -> Iterator[None]:
    """PyTorch's exceptions as ours, where PEFT's layers take the place of a model's own."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if label not in ("adapter", "rows"):
            raise
        raise ModelError(
            f"PyTorch cannot run the model with PEFT's layers at all of these points: {error}; choose other targets, "
            "or do without the verification"
        ) from error
