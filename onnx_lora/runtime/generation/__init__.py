"""Text from a package whose graph is a decoder: streaming, batches with an adapter per row, caches to go on with."""

from __future__ import annotations

from onnx_lora.runtime.generation.cache import Cache
from onnx_lora.runtime.generation.chat import Chat
from onnx_lora.runtime.generation.generator import TextGenerator
from onnx_lora.runtime.generation.sampling import Sampling
from onnx_lora.runtime.generation.stream import Generation, Piece, Stream

__all__ = ["Cache", "Chat", "Generation", "Piece", "Sampling", "Stream", "TextGenerator"]
