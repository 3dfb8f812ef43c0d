"""Package and adapters in, outputs out: per call (`AdapterSession`), or folded in before a session starts.

It needs numpy and onnxruntime. Only writing or resizing a graph loads `onnx`, and only then."""

from __future__ import annotations

from onnx_lora.runtime.fold import fold
from onnx_lora.runtime.session import AdapterSession
from onnx_lora.runtime.standalone import fold_to

__all__ = ["AdapterSession", "fold", "fold_to"]
