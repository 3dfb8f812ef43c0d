"""The weights of a checkpoint by their torch names, and finding a graph's weight among them by its values. It reads
neither checkpoints nor graphs: `torch_weights`, `safetensors_weights` and `package_weights` make it."""

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

# A first row farther than this belongs to another module: of an unrelated one it is 1.4 norms away. A row of
# small numbers may be rounded to zero.
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
        """In one of the layouts that torch may keep it in."""
        rows, columns = self.shape
        return (rows, columns) if in_out else (columns, rows)

    def by_output(self, dtype: np.dtype[np.generic], *, in_out: bool) -> Array:
        """The whole weight as `[out, in]`."""
        values = self.read(_ALL).astype(dtype, copy=False)
        return values.T if in_out else values

    def match(self, *, start: int, outputs: int, in_out: bool, first: int = 0) -> Match:
        """That a graph's weight holds, from its output `start` on, `outputs` of this one's from `first` on."""
        size = self.inputs_and_outputs(in_out=in_out)[1]
        return Match(self.module, start, outputs, in_out, first, size, partial(self.read, _ALL), self.bias)


@dataclass(frozen=True)
class _Candidate:
    """A weight in one of torch's two layouts."""

    weight: CheckpointWeight
    in_out: bool


@dataclass(frozen=True)
class _Tolerance:
    """How near a graph's weight must be to the checkpoint's: bit for bit, or so many times that one's norm."""

    within: float

    def accepts(self, values: Array, weight: Array) -> bool:
        """Whether the checkpoint's `values` are the graph's `weight`."""
        return _is_near(values, weight, self.within) if self.within else np.array_equal(values, weight)

    def accepts_row(self, values: Array, row: Array) -> bool:
        """The same of one row, which may be rounded to zero."""
        return _is_near(values, row, _FIRST_ROW_NEAR) if self.within else np.array_equal(values, row)


@dataclass(frozen=True)
class CheckpointWeights:
    """Every `.weight` of a model with two axes or more, by its module's torch name, read only when asked for.

    `heads` are the output layers that "all-linear" leaves out. None: the checkpoint is only a file,
    which says neither what is an output layer nor what is linear and what an embedding. `names`: of
    all tensors, where they are known. `refused`: modules with a weight that must not have LoRA here, and why.
    """

    weights: tuple[CheckpointWeight, ...]
    modules: frozenset[str]
    heads: frozenset[str] | None = None
    names: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)

    def find(self, weight: Array, kind: type[Kind] = Linear, *, within: float = 0.0) -> list[list[Match]]:
        """Every way to read `weight` `[in, out]` as one module's of a kind, or several linear ones packed side by side.

        Compared in the graph's type, bit for bit; a quantized weight by its distance, which may be so many times
        the norm of the checkpoint's. Usually one way; none where the graph's weight is not the
        checkpoint's; several where modules hold equal values.
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

    def find_piece(self, weight: Array, guess: str, *, within: float = 0.0) -> list[list[Match]]:
        """Every way to read `weight` `[in, out]` as some of one module's outputs: gate and up of one weight.

        Looked for among modules of the layer that the node's name `guess` counts.
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
                    found.append([candidate.match(start=0, outputs=outputs, in_out=in_out, first=first)])
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
                yield from self._find_packed(weight, start + match.outputs, (*before, match), tolerance)

    def _find_at(self, weight: Array, start: int, tolerance: _Tolerance, kind: type[Kind]) -> Iterator[Match]:
        """Modules whose weight is `weight[:, start : start + their outputs]`."""
        first = np.ascontiguousarray(weight[:, start])
        for candidate in self._find_starting_with(first, tolerance):
            known, in_out = candidate.weight, candidate.in_out
            outputs = known.inputs_and_outputs(in_out=in_out)[1]
            if start + outputs > weight.shape[1] or in_out not in known.layouts(kind):
                continue
            values = known.by_output(weight.dtype, in_out=in_out)
            if tolerance.accepts(values, weight[:, start : start + outputs].T):
                yield known.match(start=start, outputs=outputs, in_out=in_out)

    def _find_starting_with(self, first: Array, tolerance: _Tolerance) -> Iterator[_Candidate]:
        """Weights whose first output's weights are `first`, in the layout in which they are."""
        rows = self._first_rows(first.dtype)
        if not tolerance.within:
            yield from rows.by_value.get((first.size, first.tobytes()), ())
            return
        yield from rows.near(first)

    def _first_rows(self, dtype: np.dtype[np.generic]) -> _FirstRows:
        if dtype.name not in self._first_rows_by_type:
            self._first_rows_by_type[dtype.name] = _FirstRows.of(self.weights, dtype)
        return self._first_rows_by_type[dtype.name]

    @cached_property
    def _first_rows_by_type(self) -> dict[str, _FirstRows]:
        return {}


@dataclass(frozen=True)
class _FirstRows:
    """Weights by the weights of their first output, for both of torch's layouts, in one type."""

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
                by_value[row.size, row.tobytes()].append(_Candidate(weight, in_out))
        return _FirstRows(by_value, dtype)

    def near(self, first: Array) -> Iterator[_Candidate]:
        """Those that may be what a quantizer rounded to `first`."""
        candidates, rows = self._by_size.get(first.size, ((), np.empty((0, first.size), np.float32)))
        wanted: NDArray[np.float32] = first.astype(np.float32, copy=False)
        distances = np.linalg.norm(rows - wanted, axis=1)
        near = distances <= _FIRST_ROW_NEAR * np.linalg.norm(rows, axis=1)
        for index in np.flatnonzero(near):
            yield from candidates[index]

    @cached_property
    def _by_size(self) -> dict[int, tuple[list[Sequence[_Candidate]], NDArray[np.float32]]]:
        """The candidates of rows of one length, and the rows below each other."""
        candidates: dict[int, list[Sequence[_Candidate]]] = defaultdict(list)
        rows: dict[int, list[NDArray[Any]]] = defaultdict(list)
        for (size, data), found in self.by_value.items():
            candidates[size].append(found)
            rows[size].append(np.frombuffer(data, self.dtype))
        return {size: (candidates[size], np.stack(rows[size]).astype(np.float32)) for size in rows}


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
    wanted, found = values.astype(np.float32, copy=False), weight.astype(np.float32, copy=False)
    return bool(np.linalg.norm(wanted - found) <= within * np.linalg.norm(wanted))
