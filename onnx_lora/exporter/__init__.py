"""From a torch checkpoint, a torch module or an ONNX file to a package."""

from __future__ import annotations

from onnx_lora.lazy import lazy_names

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.exporter.api import attach, export
    from onnx_lora.exporter.frontends.checkpoint import Checkpoint
    from onnx_lora.exporter.frontends.onnx_files import OnnxFiles
    from onnx_lora.exporter.frontends.pipeline import Pipeline
    from onnx_lora.exporter.frontends.torch_module import TorchModule
    from onnx_lora.exporter.precision import Precision
    from onnx_lora.exporter.quantization import Method, quantize
    from onnx_lora.exporter.request import Points
    from onnx_lora.exporter.verification.adapters import TriedAdapter
    from onnx_lora.exporter.verification.comparison import Comparison
    from onnx_lora.exporter.verification.own_texts import TextComparison, compare_texts
    from onnx_lora.exporter.verification.verify import verify, verify_folded

__all__ = [
    "Checkpoint",
    "Comparison",
    "Method",
    "OnnxFiles",
    "Pipeline",
    "Points",
    "Precision",
    "TextComparison",
    "TorchModule",
    "TriedAdapter",
    "attach",
    "compare_texts",
    "export",
    "quantize",
    "verify",
    "verify_folded",
]

if not TYPE_CHECKING:  # so that checkers report names that are not there
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Checkpoint": "onnx_lora.exporter.frontends.checkpoint",
            "Comparison": "onnx_lora.exporter.verification.comparison",
            "Method": "onnx_lora.exporter.quantization",
            "OnnxFiles": "onnx_lora.exporter.frontends.onnx_files",
            "Pipeline": "onnx_lora.exporter.frontends.pipeline",
            "Points": "onnx_lora.exporter.request",
            "Precision": "onnx_lora.exporter.precision",
            "TorchModule": "onnx_lora.exporter.frontends.torch_module",
            "TriedAdapter": "onnx_lora.exporter.verification.adapters",
            "TextComparison": "onnx_lora.exporter.verification.own_texts",
            "attach": "onnx_lora.exporter.api",
            "compare_texts": "onnx_lora.exporter.verification.own_texts",
            "export": "onnx_lora.exporter.api",
            "quantize": "onnx_lora.exporter.quantization",
            "verify": "onnx_lora.exporter.verification.verify",
            "verify_folded": "onnx_lora.exporter.verification.verify",
        },
    )
