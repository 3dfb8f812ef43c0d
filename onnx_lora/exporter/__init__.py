"""From a torch checkpoint, a torch module or an ONNX file to a package."""

from __future__ import annotations

from onnx_lora.lazy import lazy_names

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.exporter.api import attach, export
    from onnx_lora.exporter.quantization import quantize
    from onnx_lora.exporter.verification import verify

__all__ = ["attach", "export", "quantize", "verify"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "attach": "onnx_lora.exporter.api",
        "export": "onnx_lora.exporter.api",
        "quantize": "onnx_lora.exporter.quantization",
        "verify": "onnx_lora.exporter.verification",
    },
)
