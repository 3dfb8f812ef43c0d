"""The two families of caches, by what a graph takes. It makes them, and knows no more of either."""

from __future__ import annotations

from onnx_lora.runtime._ort import Device
from onnx_lora.runtime.generation.graph import DecoderGraph
from onnx_lora.runtime.generation.growing import Growing
from onnx_lora.runtime.generation.memory import Memory
from onnx_lora.runtime.generation.shared import Shared

__all__ = ["make_memory"]


def make_memory(graph: DecoderGraph, device: Device, rows: int) -> Memory:
    """An empty cache for `rows` rows, of the kind that the graph takes."""
    if graph.shared:
        return Shared(graph, device, rows)
    return Growing(graph, device, rows)
