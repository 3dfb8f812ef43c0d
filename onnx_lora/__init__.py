"""Export a base model to ONNX once; fold, switch, blend and mix LoRA adapters on ONNX Runtime.

Importing this needs neither torch nor transformers nor onnx. Its names are loaded when they are first used; the
runtime's need onnxruntime.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.adapters import Adapter, BoundAdapter, bind, read_adapter, write_bound
    from onnx_lora.errors import OnnxLoraError
    from onnx_lora.package import Package
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


_HOME = {
    "onnx_lora.adapters": ("Adapter", "BoundAdapter", "bind", "read_adapter", "write_bound"),
    "onnx_lora.errors": ("OnnxLoraError",),
    "onnx_lora.package": ("Package",),
    "onnx_lora.runtime": ("AdapterSession", "Chat", "Sampling", "TextGenerator", "fold", "fold_to"),
}


def __getattr__(name: str) -> object:
    # So that the command `onnx-lora` begins at once, and Ctrl-C finds it where it ends quietly.
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'onnx_lora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
