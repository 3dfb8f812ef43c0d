"""Where graphs come from, one file a source, and who makes graphs of checkpoints, one file an exporter. A source gives
ONNX files, the weights' torch names where it knows them, and the files that belong to the model."""

from __future__ import annotations

from onnx_lora.lazy import lazy_names

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.exporter.frontends.checkpoint import Checkpoint
    from onnx_lora.exporter.frontends.onnx_files import OnnxFiles
    from onnx_lora.exporter.frontends.pipeline import Pipeline, is_pipeline
    from onnx_lora.exporter.frontends.torch_module import TorchModule

__all__ = ["Checkpoint", "OnnxFiles", "Pipeline", "TorchModule", "is_pipeline"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Checkpoint": "onnx_lora.exporter.frontends.checkpoint",
        "OnnxFiles": "onnx_lora.exporter.frontends.onnx_files",
        "Pipeline": "onnx_lora.exporter.frontends.pipeline",
        "TorchModule": "onnx_lora.exporter.frontends.torch_module",
        "is_pipeline": "onnx_lora.exporter.frontends.pipeline",
    },
)
