"""Export a base model to ONNX once; fold, switch, blend and mix LoRA adapters on ONNX Runtime.

Importing this needs neither torch nor transformers nor onnx. Its names are loaded when they are first used; the
runtime's need onnxruntime.
"""

from __future__ import annotations

from onnx_lora.lazy import lazy_names

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.adapters import Adapter, BoundAdapter, bind, read_adapter, write_bound
    from onnx_lora.errors import OnnxLoraError
    from onnx_lora.package import Package
    from onnx_lora.runtime import AdapterSession, Chat, Sampling, TextGenerator, fold, fold_to, measure

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
    "measure",
    "read_adapter",
    "write_bound",
]

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Adapter": "onnx_lora.adapters",
        "BoundAdapter": "onnx_lora.adapters",
        "bind": "onnx_lora.adapters",
        "read_adapter": "onnx_lora.adapters",
        "write_bound": "onnx_lora.adapters",
        "OnnxLoraError": "onnx_lora.errors",
        "Package": "onnx_lora.package",
        "AdapterSession": "onnx_lora.runtime",
        "Chat": "onnx_lora.runtime",
        "Sampling": "onnx_lora.runtime",
        "TextGenerator": "onnx_lora.runtime",
        "fold": "onnx_lora.runtime",
        "fold_to": "onnx_lora.runtime",
        "measure": "onnx_lora.runtime",
    },
)
