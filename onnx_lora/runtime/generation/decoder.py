"""One generation's runs of the graph: its adapter bound once, and what changes bound run by run. How the cache lies
in memory is the business of `growing.py` and `shared.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnx_lora.onnxruntime_errors import fail_in_run
from onnx_lora.points import Array
from onnx_lora.runtime._ort import CPU, Device, ort
from onnx_lora.runtime.generation.graph import DecoderGraph, make_zeros
from onnx_lora.runtime.generation.memory import Memory
from onnx_lora.runtime.lease import Lease

__all__ = ["Decoder"]

# TensorProto.DataType
_ELEMENTS = {np.dtype(np.int64): 7, np.dtype(np.int32): 6}


class Decoder:
    """Runs a graph with one choice of adapters over one memory."""

    def __init__(self, graph: DecoderGraph, lease: Lease, memory: Memory) -> None:
        self.graph = graph
        self.binding = lease.bind()
        # An IOBinding of older ONNX Runtimes keeps no arrays alive.
        self._lease = lease
        self._fed: dict[str, tuple[Array, Any]] = {}
        self._in_place = Device.of(lease.session) == CPU
        self._scores: Any = None
        self._memory = memory
        with fail_in_run():
            # First of the outputs: `outputs` gives the others.
            self.binding.bind_output(graph.logits, "cpu")
            memory.connect(self)

    def feed(self, tokens: Sequence[Sequence[int]]) -> Array:
        """As `Memory.feed`: tokens behind each row in, logits out. The array is overwritten by the next call.

        Raises RunError: ONNX Runtime failed.
        """
        return self._memory.feed(self, tokens)

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        """Logits: [rows, tokens, vocabulary]; of the last token alone where the graph gives no others.

        An array that was given to the run before may have been written to in between.
        """
        graph, binding = self.graph, self.binding
        with fail_in_run():
            self._bind(graph.ids, ids)
            self._bind(graph.mask, mask)
            if graph.positions is not None:
                self._bind(graph.positions, positions)
            scores = self._step_scores(len(ids)) if ids.shape[1] == 1 else None
            if scores is None:
                binding.bind_output(graph.logits, "cpu")
                self._scores = None
            self._lease.session.run_with_iobinding(binding)
            if scores is None:
                scores = binding.get_outputs()[0].numpy()
        return scores

    def _bind(self, name: str, array: Array) -> None:
        """Bind an input, unless it is bound already. Other devices copy it when it is bound, and have to again."""
        if self._in_place and name in self._fed and self._fed[name][0] is array:
            return
        kind = self.graph.numbers[name]
        given = np.ascontiguousarray(array, kind)
        value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(given, _ELEMENTS[kind])
        self.binding.bind_ortvalue_input(name, value)
        # Of a copy the array itself is not what is bound.
        self._fed[name] = given, value

    def _step_scores(self, rows: int) -> Array | None:
        """Where the logits of one token go, step after step; None where the graph does not say how many there are."""
        if self.graph.vocabulary is None:
            return None
        if self._scores is None:
            scores = make_zeros((rows, 1, self.graph.vocabulary), self.graph.scores)
            self._scores = ort.OrtValue.ortvalue_from_numpy(scores), scores
            self.binding.bind_ortvalue_output(self.graph.logits, self._scores[0])
        array: Array = self._scores[1]
        return array

    def outputs(self) -> list[Any]:
        """The cache's outputs of the last run, on the device."""
        return list(self.binding.get_outputs()[1:])
