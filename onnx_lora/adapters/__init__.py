"""Adapter files in, bound adapters out: reading, checking against a package, composing, writing.

Needs numpy and safetensors; ONNX Runtime only for `.onnx_adapter` files. Its names are loaded when they are first used.
"""

from __future__ import annotations

from onnx_lora.lazy import lazy_names

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.adapters.adapter import (
        Adapter,
        BoundAdapter,
        Change,
        Coverage,
        Delta,
        MatrixDelta,
        Origin,
        Replacement,
    )
    from onnx_lora.adapters.batch.convert import Converted, ConvertedFolder
    from onnx_lora.adapters.binding import bind
    from onnx_lora.adapters.compose import blend
    from onnx_lora.adapters.read import read_adapter
    from onnx_lora.adapters.row_stacking import stack_rows
    from onnx_lora.adapters.write import convert_all, write_adapter, write_bound

__all__ = [
    "Adapter",
    "BoundAdapter",
    "Change",
    "Converted",
    "ConvertedFolder",
    "Coverage",
    "Delta",
    "MatrixDelta",
    "Origin",
    "Replacement",
    "bind",
    "blend",
    "convert_all",
    "read_adapter",
    "stack_rows",
    "write_adapter",
    "write_bound",
]

if not TYPE_CHECKING:  # so that checkers report names that are not there
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Adapter": "onnx_lora.adapters.adapter",
            "BoundAdapter": "onnx_lora.adapters.adapter",
            "Change": "onnx_lora.adapters.adapter",
            "Coverage": "onnx_lora.adapters.adapter",
            "Delta": "onnx_lora.adapters.adapter",
            "MatrixDelta": "onnx_lora.adapters.adapter",
            "Origin": "onnx_lora.adapters.adapter",
            "Replacement": "onnx_lora.adapters.adapter",
            "Converted": "onnx_lora.adapters.batch.convert",
            "ConvertedFolder": "onnx_lora.adapters.batch.convert",
            "convert_all": "onnx_lora.adapters.write",
            "bind": "onnx_lora.adapters.binding",
            "blend": "onnx_lora.adapters.compose",
            "stack_rows": "onnx_lora.adapters.row_stacking",
            "read_adapter": "onnx_lora.adapters.read",
            "write_adapter": "onnx_lora.adapters.write",
            "write_bound": "onnx_lora.adapters.write",
        },
    )
