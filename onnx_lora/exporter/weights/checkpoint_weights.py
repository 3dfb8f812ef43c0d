"""The weights of a checkpoint by their torch names, and finding a graph's weight among them by its values. It reads
neither checkpoints nor graphs: `torch_weights`, `safetensors_weights` and `package_weights` make these objects."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array, Bias

__all__ = ["CheckpointWeight", "CheckpointWeights", "Match", "numbers_in"]

# A part of a weight of two axes.
Part = tuple[slice, slice]

_ALL: Part = (slice(None), slice(None))
_FIRST_ROW: Part = (slice(0, 1), slice(None))
_FIRST_COLUMN: Part = (slice(None), slice(0, 1))

# A first row that is farther than this many norms belongs to another module: rows of unrelated modules are 1.4 norms
# apart. A row of small numbers may be rounded to zero, which is one norm.
_FIRST_ROW_NEAR = 1.0


@dataclass(frozen=True, slots=True)
class Match:
    """A checkpoint's module whose weight a graph holds: its outputs `start` to `start + outputs` are the
    module's from `first` on, of `size` in all.

    `in_out`: torch keeps this weight `[in, out]` (transformers' Conv1D, embeddings), not `[out, in]`. `read` gives it
    whole. `bias`: whether the module has one.
    """

    module: str
    start: int
    outputs: int
    in_out: bool
    first: int
    size: int
    read: Callable[[], Array]
    bias: Bias = "unknown"


@dataclass(frozen=True)
class CheckpointWeight:
    """One module's weight, a convolution's as `[out, channels · kernel]`, read only when asked for.

    `kinds`: those that its module may be of.
    """

    module: str
    shape: tuple[int, int]
    read: Callable[[Part], Array]
    kinds: tuple[GraphKind, ...]
    bias: Bias = "unknown"

    def layouts(self, kind: type[Kind]) -> tuple[bool, ...]:
        """Whether torch may keep it `[in, out]`, if it is a module of this kind; nothing if it is none."""
        for graph_kind in self.kinds:
            if graph_kind.kind is kind:
                return graph_kind.layouts
        return ()

    def inputs_and_outputs(self, *, in_out: bool) -> tuple[int, int]:
        """How many inputs and outputs it has, in one of the layouts that torch may keep it in."""
        rows, columns = self.shape
        if in_out:
            return rows, columns
        return columns, rows

    def by_output(self, dtype: np.dtype[np.generic], *, in_out: bool) -> Array:
        """The whole weight as `[out, in]`."""
        values = self.read(_ALL).astype(dtype, copy=False)
        return values.T if in_out else values

    def match(self, *, start: int, outputs: int, in_out: bool, first: int = 0) -> Match:
        """Say that a graph's weight holds, from its output `start` on, `outputs` of this one's from `first` on."""
        _, size = self.inputs_and_outputs(in_out=in_out)
        return Match(
            module=self.module,
            start=start,
            outputs=outputs,
            in_out=in_out,
            first=first,
            size=size,
            read=partial(self.read, _ALL),
            bias=self.bias,
        )


@dataclass(frozen=True)
class _Candidate:
    """A weight in one of torch's two layouts."""

    weight: CheckpointWeight
    in_out: bool


@dataclass(frozen=True)
class _Tolerance:
    """How near a graph's weight must be to the checkpoint's: equal bit for bit, or not farther than `within` times the
    norm of the checkpoint's."""

    within: float

    @property
    def is_exact(self) -> bool:
        return self.within == 0.0

    def accepts(self, values: Array, weight: Array) -> bool:
        """Whether the checkpoint's `values` are the graph's `weight`."""
        if self.is_exact:
            return np.array_equal(values, weight)
        return _is_near(values, weight, self.within)

    def accepts_row(self, values: Array, row: Array) -> bool:
        """Whether one row of the checkpoint may be the graph's `row`, which may be rounded to zero."""
        if self.is_exact:
            return np.array_equal(values, row)
        return _is_near(values, row, _FIRST_ROW_NEAR)


@dataclass(frozen=True)
class CheckpointWeights:
    """Every `.weight` of a model with two axes or more, by its module's torch name, read only when asked for.

    `heads` are the output layers that "all-linear" leaves out. None: the checkpoint is only a file,
    which says neither what is an output layer nor what is linear and what an embedding. `names`: of
    all tensors, where they are known. `refused`: modules with a weight that must not have LoRA here, and why.
    `vectors`: the tensors of one axis, by torch name, read when asked for.
    """

    weights: tuple[CheckpointWeight, ...]
    modules: frozenset[str]
    heads: frozenset[str] | None = None
    names: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, Callable[[], Array]] = field(default_factory=dict)

    def find(self, weight: Array, kind: type[Kind] = Linear, *, within: float = 0.0) -> list[list[Match]]:
        """Every way to read `weight` `[in, out]` as one module's of a kind, or several linear ones packed side by side.

        Weights are compared in the graph's type, bit for bit; a quantized weight by its distance, which may be `within`
        times the norm of the checkpoint's. Usually there is one way; there is none where the graph's weight is not the
        checkpoint's, and there are several where modules hold equal values.
        """
        tolerance = _Tolerance(within)
        whole: dict[str, list[Match]] = {}
        for match in self._find_at(weight, 0, tolerance, kind):
            if match.outputs == weight.shape[1]:
                whole[match.module] = [match]
        if whole or kind is not Linear:
            return list(whole.values())
        return list(self._find_packed(weight, 0, (), tolerance))

    def matrices(self, module: str) -> Iterator[Array]:
        """A module's weight as `[in, out]`, in every layout that torch may keep it in."""
        for weight in self.weights:
            if weight.module == module:
                values = weight.read(_ALL).astype(np.float32, copy=False)
                yield values.T
                yield values

    def modules_like(self, weight: Array, kind: type[Kind]) -> Iterator[str]:
        """The modules that may be of a kind and whose weight is `[in, out]` as large as `weight`."""
        for known in self.weights:
            if any(known.inputs_and_outputs(in_out=in_out) == weight.shape for in_out in known.layouts(kind)):
                yield known.module

    def find_piece(self, weight: Array, guess: str, *, within: float = 0.0) -> list[list[Match]]:
        """Every way to read `weight` `[in, out]` as some of one module's outputs: gate and up of one weight.

        Only modules are tried whose names hold the same numbers as the node's name `guess`: those of its layer.
        """
        inputs, outputs = weight.shape
        tolerance = _Tolerance(within)
        found: list[list[Match]] = []
        for candidate in self._by_numbers.get(numbers_in(guess), ()):
            for in_out in candidate.layouts(Linear):
                own_inputs, own_outputs = candidate.inputs_and_outputs(in_out=in_out)
                if own_inputs != inputs or own_outputs <= outputs:
                    continue
                values = candidate.by_output(weight.dtype, in_out=in_out)
                for first in _find_window(values, weight.T, tolerance):
                    match = candidate.match(start=0, outputs=outputs, in_out=in_out, first=first)
                    found.append([match])
        return found

    @cached_property
    def _by_numbers(self) -> dict[tuple[str, ...], list[CheckpointWeight]]:
        """The weights by the numbers in their modules' names, which count layers."""
        found: dict[tuple[str, ...], list[CheckpointWeight]] = defaultdict(list)
        for weight in self.weights:
            found[numbers_in(weight.module)].append(weight)
        return found

    def _find_packed(
        self, weight: Array, start: int, before: tuple[Match, ...], tolerance: _Tolerance
    ) -> Iterator[list[Match]]:
        """Every way to go on behind `before` with modules that were not used yet."""
        if start == weight.shape[1]:
            yield list(before)
            return
        used = {match.module for match in before}
        for match in self._find_at(weight, start, tolerance, Linear):
            if match.module not in used:
                end = start + match.outputs
                yield from self._find_packed(weight, end, (*before, match), tolerance)

    def _find_at(self, weight: Array, start: int, tolerance: _Tolerance, kind: type[Kind]) -> Iterator[Match]:
        """Modules whose weight is `weight[:, start : start + their outputs]`."""
        first = np.ascontiguousarray(weight[:, start])
        for candidate in self._find_starting_with(first, tolerance):
            known = candidate.weight
            in_out = candidate.in_out
            _, outputs = known.inputs_and_outputs(in_out=in_out)
            end = start + outputs
            if end > weight.shape[1] or in_out not in known.layouts(kind):
                continue
            values = known.by_output(weight.dtype, in_out=in_out)
            own = weight[:, start:end].T
            if tolerance.accepts(values, own):
                yield known.match(start=start, outputs=outputs, in_out=in_out)

    def _find_starting_with(self, first: Array, tolerance: _Tolerance) -> Iterator[_Candidate]:
        """Weights of which the first output's are `first`, in the layout in which they are."""
        rows = self._first_rows(first.dtype)
        if tolerance.is_exact:
            yield from rows.equal(first)
        else:
            yield from rows.near(first)

    def _first_rows(self, dtype: np.dtype[np.generic]) -> _FirstRows:
        known = self._first_rows_by_type.get(dtype.name)
        if known is None:
            known = _FirstRows.of(self.weights, dtype)
            self._first_rows_by_type[dtype.name] = known
        return known

    @cached_property
    def _first_rows_by_type(self) -> dict[str, _FirstRows]:
        return {}


@dataclass(frozen=True)
class _FirstRows:
    """Weights by their first row, that is by the weights of their first output, in one type.

    Each weight stands here twice, once for each of torch's layouts. The key is the row's length and its bytes.
    """

    by_value: Mapping[tuple[int, bytes], Sequence[_Candidate]]
    dtype: np.dtype[np.generic]

    @staticmethod
    def of(weights: Sequence[CheckpointWeight], dtype: np.dtype[np.generic]) -> _FirstRows:
        by_value: dict[tuple[int, bytes], list[_Candidate]] = defaultdict(list)
        for weight in weights:
            if 0 in weight.shape:
                continue
            for in_out, part in ((False, _FIRST_ROW), (True, _FIRST_COLUMN)):
                row = weight.read(part).astype(dtype).ravel()
                key = row.size, row.tobytes()
                by_value[key].append(_Candidate(weight, in_out))
        return _FirstRows(by_value, dtype)

    def equal(self, first: Array) -> Sequence[_Candidate]:
        """The weights whose first row is `first`, bit for bit."""
        return self.by_value.get((first.size, first.tobytes()), ())

    def near(self, first: Array) -> Iterator[_Candidate]:
        """The weights whose first row may be what a quantizer rounded to `first`."""
        rows = self._by_size.get(first.size)
        if rows is None:
            return
        wanted: NDArray[np.float32] = first.astype(np.float32, copy=False)
        distances = np.linalg.norm(rows.values - wanted, axis=1)
        norms = np.linalg.norm(rows.values, axis=1)
        for index in np.flatnonzero(distances <= _FIRST_ROW_NEAR * norms):
            yield from rows.candidates[index]

    @cached_property
    def _by_size(self) -> dict[int, _RowsOfOneLength]:
        candidates: dict[int, list[Sequence[_Candidate]]] = defaultdict(list)
        rows: dict[int, list[NDArray[Any]]] = defaultdict(list)
        for (size, data), found in self.by_value.items():
            candidates[size].append(found)
            rows[size].append(np.frombuffer(data, self.dtype))
        by_size: dict[int, _RowsOfOneLength] = {}
        for size, alike in rows.items():
            values = np.stack(alike).astype(np.float32)
            by_size[size] = _RowsOfOneLength(candidates[size], values)
        return by_size


@dataclass(frozen=True)
class _RowsOfOneLength:
    """First rows of one length below each other, `[rows, length]`, and the weights that begin with each."""

    candidates: list[Sequence[_Candidate]]
    values: NDArray[np.float32]


def numbers_in(name: str) -> tuple[str, ...]:
    """The numbers in a module's name: they count layers."""
    return tuple(re.findall(r"\d+", name))


def _find_window(values: Array, piece: Array, tolerance: _Tolerance) -> Iterator[int]:
    """Where `piece` `[some out, in]` lies in `values` `[out, in]`."""
    length = len(piece)
    for begin in range(len(values) - length + 1):
        if not tolerance.accepts_row(values[begin], piece[0]):
            continue
        end = begin + length
        if tolerance.accepts_row(values[end - 1], piece[-1]) and tolerance.accepts(values[begin:end], piece):
            yield begin


def _is_near(values: Array, weight: Array, within: float) -> bool:
    """Whether a weight is not farther from `values` than `within` times their norm."""
    wanted = values.astype(np.float32, copy=False)
    found = weight.astype(np.float32, copy=False)
    distance = np.linalg.norm(wanted - found)
    return bool(distance <= within * np.linalg.norm(wanted))
