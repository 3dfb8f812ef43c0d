"""Adapter files in, bound adapters out: reading, checking against a package, composing, writing.

Needs numpy and safetensors; ONNX Runtime only for `.onnx_adapter` files.
"""

from __future__ import annotations

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, Change, Coverage, Delta, MatrixDelta, Origin, Replacement
from onnx_lora.adapters.bind import bind
from onnx_lora.adapters.compose import blend, stack_rows
from onnx_lora.adapters.formats.converted.files import write_bound
from onnx_lora.adapters.read import read_adapter

__all__ = [
    "Adapter",
    "BoundAdapter",
    "Change",
    "Coverage",
    "Delta",
    "MatrixDelta",
    "Origin",
    "Replacement",
    "bind",
    "blend",
    "read_adapter",
    "stack_rows",
    "write_bound",
]
