"""A cache in place: one buffer for past and present of each tensor, as GroupQueryAttention takes it. Every row is
filled from its start without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_lora.points import Array
from onnx_lora.runtime._ort import Device
from onnx_lora.runtime.generation.decoder import Decoder
from onnx_lora.runtime.generation.graph import DecoderGraph

__all__ = ["Shared"]

# As for a growing cache; there it is explained.
_PIECE = 512  # tokens

# Buffers are made longer by this much at least: a cache that is gone on with is copied once, not with every call.
_ROUND = 64  # tokens


class Shared:
    """The operator takes from the mask its sum, a row's tokens, and its length, the longest row's. What is padded lies
    behind a row's tokens, and the row's next ones are written over it."""

    def __init__(self, graph: DecoderGraph, device: Device, rows: int) -> None:
        self._graph = graph
        self._device = device
        self._rows = rows
        self._capacity = 0  # tokens
        self._buffers: list[Any] = []
        self._lengths = [0] * rows
        self._last = [0] * rows  # each row's last token

    def reserve(self, tokens: int) -> None:
        used = max(self._lengths)
        if used + tokens > self._capacity:
            self._capacity = -(-(used + tokens) // _ROUND) * _ROUND
            self._buffers = self._moved(used)

    def _moved(self, used: int) -> list[Any]:
        """Buffers of the new length with the old ones' tokens."""
        buffers = []
        old = self._buffers or [None] * len(self._graph.parts)
        for part, buffer in zip(self._graph.parts, old, strict=True):
            array = self._graph.zeros(part, self._rows, self._capacity)
            if used and buffer is not None:
                array[:, :, :used] = buffer.numpy()[:, :, :used]
            buffers.append(self._device.value(array))
        return buffers

    def connect(self, decoder: Decoder) -> None:
        for part, buffer in zip(self._graph.parts, self._buffers, strict=True):
            decoder.binding.bind_ortvalue_input(part.past, buffer)
            decoder.binding.bind_ortvalue_output(part.present, buffer)

    def feed(self, decoder: Decoder, tokens: Sequence[Sequence[int]]) -> Array:
        width = max(map(len, tokens))
        if self._rows == 1:
            for start in range(0, width, _PIECE):
                logits = self._run(decoder, [tokens[0][start : start + _PIECE]])
            return logits
        if width == 1 or not any(self._lengths):
            return self._run(decoder, tokens)
        return self._one_by_one(decoder, tokens, width)

    def _one_by_one(self, decoder: Decoder, tokens: Sequence[Sequence[int]], width: int) -> Array:
        """The operator takes several tokens behind a past for one row only."""
        kept: dict[int, Array] = {}
        for step in range(width):
            logits = self._run(decoder, [row[step : step + 1] for row in tokens])
            kept |= {row: logits[row].copy() for row, each in enumerate(tokens) if len(each) == step + 1}
        return np.stack([kept.get(row, logits[row]) for row in range(self._rows)])

    def _run(self, decoder: Decoder, tokens: Sequence[Sequence[int]]) -> Array:
        counts = [len(row) for row in tokens]
        width = max(1, *counts)
        # A row without a token is fed its last one again, to the place where it lies already: nothing changes.
        starts = [length - (not new) for length, new in zip(self._lengths, counts, strict=True)]
        ids = np.zeros((self._rows, width), np.int64)
        for row, each in enumerate(tokens):
            ids[row, : max(1, len(each))] = each if len(each) else self._last[row]
        lengths = [length + new for length, new in zip(self._lengths, counts, strict=True)]
        positions = np.array(starts)[:, None] + np.arange(width)
        logits = decoder.run(ids, _mask(lengths), positions)
        self._lengths = lengths
        self._last = [int(each[-1]) if len(each) else old for each, old in zip(tokens, self._last, strict=True)]
        if width == 1 or min(counts) == width:
            return logits[:, -1]
        if logits.shape[1] == width:
            own: Array = logits[np.arange(self._rows), np.maximum(np.array(counts), 1) - 1]
            return own
        # The graph keeps the last column's logits only, and shorter rows end before it.
        return self._run(decoder, [()] * self._rows)

    def copy(self) -> Shared:
        other = object.__new__(Shared)
        other.__dict__.update(self.__dict__)
        other._buffers = other._moved(max(self._lengths))
        return other


def _mask(lengths: Sequence[int]) -> Array:
    if len(lengths) == 1:
        return np.ones((1, lengths[0]), np.int64)
    return (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
