"""A cache that grows: each run gives new keys and values, longer by what it was fed, and they are the next run's past.
They stay where ONNX Runtime put them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_lora.points import Array
from onnx_lora.runtime._ort import Device
from onnx_lora.runtime.generation.graph import DecoderGraph, make_zeros
from onnx_lora.runtime.generation.memory import Runner

__all__ = ["Growing"]

# A long prompt goes in pieces: logits of a whole one, 128000 words wide, would take 2 GB in 4000 tokens.
_PIECE = 512  # tokens

# The least that a mask is made for.
_ROUND = 64  # tokens


class Growing:
    """Rows are aligned at their ends: padding lies before a row's tokens or between them, and the mask hides it."""

    def __init__(self, graph: DecoderGraph, device: Device, rows: int) -> None:
        self._graph = graph
        self._device = device
        self._past: list[Any] = [device.value(graph.make_empty(part, rows, 0)) for part in graph.parts]
        self._mask: Array = np.zeros((rows, 0), np.int64)
        self._width = 0  # columns of the mask in use
        self._lengths = np.zeros((rows, 1), np.int64)  # tokens of each row, without padding

    def reserve(self, tokens: int) -> None:
        """ONNX Runtime makes room in the cache, run by run; `_lengthen` in the mask."""

    def connect(self, runner: Runner) -> None:
        self._bind(runner)

    def feed(self, runner: Runner, tokens: Sequence[Sequence[int]]) -> Array:
        width = max(map(len, tokens))
        ids = make_zeros((len(tokens), width), np.int64)
        new = np.zeros_like(ids)
        for row, each in enumerate(tokens):
            begin = width - len(each)
            ids[row, begin:] = each
            new[row, begin:] = 1
        # A piece must not be all padding in some row.
        length = _PIECE if len(tokens) == 1 else width
        for start in range(0, width, length):
            piece = slice(start, start + length)
            logits = self._run(runner, ids[:, piece], new[:, piece])
        return logits[:, -1]

    def _run(self, runner: Runner, ids: Array, new: Array) -> Array:
        end = self._width + ids.shape[1]
        if end > self._mask.shape[1]:
            self._lengthen(max(end, 2 * self._mask.shape[1], _ROUND))
        self._mask[:, self._width : end] = new
        steps = new.cumsum(axis=1)
        # As transformers numbers them; padding may have the number of any position.
        positions = np.maximum(self._lengths + steps - 1, 0)
        logits = runner.run(ids, self._mask[:, :end], positions)
        self._past = runner.outputs()
        self._bind(runner)
        self._width = end
        self._lengths = self._lengths + steps[:, -1:]
        return logits

    def _lengthen(self, columns: int) -> None:
        mask = make_zeros((len(self._mask), columns), np.int64)
        mask[:, : self._width] = self._mask[:, : self._width]
        self._mask = mask

    def _bind(self, runner: Runner) -> None:
        binding, device = runner.binding, self._device
        for part, value in zip(self._graph.parts, self._past, strict=True):
            binding.bind_ortvalue_input(part.past, value)
            binding.bind_output(part.present, device.kind, device.index)

    def copy(self) -> Growing:
        # No run writes into what an earlier one gave.
        other = object.__new__(Growing)
        other.__dict__.update(self.__dict__, _mask=self._mask.copy())
        return other
