"""A cache in place: one buffer for past and present of each tensor, as GroupQueryAttention takes it. Every row is
filled from its start without gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_lora.points import Array
from onnx_lora.runtime._ort import Device
from onnx_lora.runtime.generation.graph import DecoderGraph, make_zeros
from onnx_lora.runtime.generation.memory import Runner

__all__ = ["Shared"]

# A long prompt goes in pieces, as `growing.py` explains.
_PIECE = 512  # tokens

# Buffers grow by this much at least, so that a cache which several calls go on with is not copied in each of them.
_ROUND = 64  # tokens


class Shared:
    """The operator reads two numbers from the mask: a row's sum says how many tokens the row has, and the mask's length
    how many the longest row has. Padding lies behind a row's tokens, and the row's next tokens are written over it."""

    def __init__(self, graph: DecoderGraph, device: Device, rows: int) -> None:
        self._graph = graph
        self._device = device
        self._rows = rows
        self._capacity = 0  # tokens
        self._buffers: list[Any] = []
        self._lengths = [0] * rows
        # What a step is fed, written in place: each row's last token, and its place.
        self._ids = np.zeros((rows, 1), np.int64)
        self._places = np.zeros((rows, 1), np.int64)
        self._columns = np.ones((1, 0), np.int64)  # what masks are made of

    def reserve(self, tokens: int) -> None:
        used = max(self._lengths)
        if used + tokens > self._capacity:
            rounds = math.ceil((used + tokens) / _ROUND)
            self._capacity = rounds * _ROUND
            self._buffers = self._copy_buffers(used)

    def _copy_buffers(self, used: int) -> list[Any]:
        """New buffers, as long as the capacity, with the `used` first tokens of the present ones."""
        buffers: list[Any] = []
        old = self._buffers or [None] * len(self._graph.parts)
        for part, buffer in zip(self._graph.parts, old, strict=True):
            array = self._graph.make_empty(part, self._rows, self._capacity)
            if used and buffer is not None:
                array[:, :, :used] = buffer.numpy()[:, :, :used]
            buffers.append(self._device.value(array))
        return buffers

    def connect(self, runner: Runner) -> None:
        for part, buffer in zip(self._graph.parts, self._buffers, strict=True):
            runner.binding.bind_ortvalue_input(part.past, buffer)
            runner.binding.bind_ortvalue_output(part.present, buffer)

    def feed(self, runner: Runner, tokens: Sequence[Sequence[int]]) -> Array:
        width = max(map(len, tokens))
        if width == 1:
            return self._step(runner, tokens)
        if self._rows == 1:
            for start in range(0, width, _PIECE):
                logits = self._run(runner, [tokens[0][start : start + _PIECE]])
            return logits
        if not any(self._lengths):
            return self._run(runner, tokens)
        return self._feed_singly(runner, tokens)

    def _feed_singly(self, runner: Runner, tokens: Sequence[Sequence[int]]) -> Array:
        """Token by token: the operator takes several tokens behind a past for one row only.

        Returns the logits behind each row's last token, `[rows, vocabulary]`.
        """
        last: dict[int, Array] = {}
        for step in range(max(map(len, tokens))):
            logits = self._step(runner, [row[step : step + 1] for row in tokens])
            for row, each in enumerate(tokens):
                if len(each) == step + 1:
                    last[row] = logits[row].copy()
        return np.stack([last.get(row, logits[row]) for row in range(self._rows)])

    def _step(self, runner: Runner, tokens: Sequence[Sequence[int]]) -> Array:
        """One token for each row, or none: then its last one is fed again, to the place where it lies already, and
        nothing changes. This is the loop whose time counts."""
        for row, each in enumerate(tokens):
            if each:
                self._lengths[row] += 1
                self._ids[row, 0] = each[0]
                self._places[row, 0] = self._lengths[row] - 1
        return runner.run(self._ids, self._mask(), self._places)[:, -1]

    def _run(self, runner: Runner, tokens: Sequence[Sequence[int]]) -> Array:
        """Several tokens, for every row at least one."""
        counts = [len(row) for row in tokens]
        width = max(counts)
        ids = make_zeros((self._rows, width), np.int64)
        positions = np.array(self._lengths)[:, None] + np.arange(width)
        for row, each in enumerate(tokens):
            ids[row, : len(each)] = each
            self._ids[row, 0] = each[-1]
            self._lengths[row] += len(each)
            self._places[row, 0] = self._lengths[row] - 1
        logits = runner.run(ids, self._mask(), positions)
        if min(counts) == width:
            return logits[:, -1]
        if logits.shape[1] == width:
            own: Array = logits[np.arange(self._rows), np.array(counts) - 1]
            return own
        # The graph keeps the last column's logits only, and shorter rows end before it.
        return self._step(runner, [()] * self._rows)

    def _mask(self) -> Array:
        """Ones for a row's tokens: [rows, tokens of the longest]."""
        longest = max(self._lengths)
        if longest > self._columns.shape[1]:
            # Shorter than the capacity: memory costs nothing until it is written to, and this array is written.
            width = max(longest, 2 * self._columns.shape[1], _ROUND)
            numbers = np.arange(width)[None]
            self._columns = np.ones_like(numbers) if self._rows == 1 else numbers
        if self._rows == 1:
            return self._columns[:, :longest]
        return self._columns[:, :longest] <= self._places

    def copy(self) -> Shared:
        other = object.__new__(Shared)
        other.__dict__.update(self.__dict__)
        # What a step writes into.
        other._lengths = list(self._lengths)
        other._ids = self._ids.copy()
        other._places = self._places.copy()
        other._buffers = other._copy_buffers(max(self._lengths))
        return other
