"""Export a base model to ONNX once; fold, switch, blend and mix LoRA adapters on ONNX Runtime.

Importing this needs neither torch nor transformers nor onnx. The runtime's names need
onnxruntime, and are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnx_lora.adapters import Adapter, BoundAdapter, bind, read_adapter, write_bound
from onnx_lora.errors import OnnxLoraError
from onnx_lora.package import Package

if TYPE_CHECKING:
    from onnx_lora.runtime import AdapterSession, Chat, Sampling, TextGenerator, fold, fold_to

__all__ = [
    "Adapter",
    "AdapterSession",
    "BoundAdapter",
    "Chat",
    "OnnxLoraError",
    "Package",
    "Sampling",
    "TextGenerator",
    "__version__",
    "bind",
    "fold",
    "fold_to",
    "read_adapter",
    "write_bound",
]

__version__ = "0.1.0"


_RUNTIME = frozenset(["AdapterSession", "Chat", "Sampling", "TextGenerator", "fold", "fold_to"])


def __getattr__(name: str) -> Any:
    if name in _RUNTIME:
        return getattr(import_module("onnx_lora.runtime"), name)
    raise AttributeError(f"module 'onnx_lora' has no attribute {name!r}")
