"""The one exception that readers of files raise among themselves. Who knows the file's path turns it into an error of
`onnx_lora.errors`."""

from __future__ import annotations

__all__ = ["TensorError"]


class TensorError(Exception):
    """What is wrong with a tensor, with the tensors of a module, or with the bytes that hold them; the text says what
    must hold and what was found."""
