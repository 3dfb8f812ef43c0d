"""Package and adapters in, outputs out: per call (`AdapterSession`), or folded in before a session starts; and text
(`TextGenerator`).

It needs numpy and onnxruntime. Only writing or resizing a graph loads `onnx`, and only then; only text loads
`tokenizers`, and only a chat `jinja2`."""

from __future__ import annotations

from onnx_lora.runtime.fold import fold
from onnx_lora.runtime.generation import Cache, Chat, Generation, Piece, Sampling, Stream, TextGenerator
from onnx_lora.runtime.requantize import Requantize, Rounding
from onnx_lora.runtime.session import AdapterSession
from onnx_lora.runtime.standalone import fold_to

__all__ = [
    "AdapterSession",
    "Cache",
    "Chat",
    "Generation",
    "Piece",
    "Requantize",
    "Rounding",
    "Sampling",
    "Stream",
    "TextGenerator",
    "fold",
    "fold_to",
]
