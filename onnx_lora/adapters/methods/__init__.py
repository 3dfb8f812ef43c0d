"""One file a method: the names of its tensors and of its config's fields, what they do to a weight, its row of the
docs. `registry.py` lists them; none knows a file or a package.

The names here are what a method of another distribution needs; they are loaded when they are first used.
"""

from __future__ import annotations

from onnx_lora.lazy import lazy_names

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.adapters.methods.method import (
        Contribution,
        DocsRow,
        Fields,
        Method,
        Module,
        Refusal,
        bare_parameters,
    )
    from onnx_lora.adapters.methods.registry import METHODS
    from onnx_lora.adapters.problems import TensorError

__all__ = [
    "METHODS",
    "Contribution",
    "DocsRow",
    "Fields",
    "Method",
    "Module",
    "Refusal",
    "TensorError",
    "bare_parameters",
]

_METHOD = "onnx_lora.adapters.methods.method"

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "METHODS": "onnx_lora.adapters.methods.registry",
        "DocsRow": _METHOD,
        "Fields": _METHOD,
        "Method": _METHOD,
        "Module": _METHOD,
        "Contribution": _METHOD,
        "Refusal": _METHOD,
        "TensorError": "onnx_lora.adapters.problems",
        "bare_parameters": _METHOD,
    },
)
