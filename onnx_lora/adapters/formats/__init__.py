"""Files of adapters: a folder for each family of formats, one object for each format, one registry of all of them.

The names here are what a format of another distribution is made of. They are loaded when they are first used.
"""

from __future__ import annotations

from onnx_lora.lazy import lazy_names

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.adapters.adapter import PortableAdapter
    from onnx_lora.adapters.formats.builder import AdapterBuilder, alpha_of, two_factors
    from onnx_lora.adapters.formats.files.reading import Reading, TensorFile
    from onnx_lora.adapters.formats.format import AdapterFormat, ReadsInitial, Row, WritesBound, WritesPortable
    from onnx_lora.adapters.formats.place import Place
    from onnx_lora.adapters.problems import TensorError
    from onnx_lora.adapters.scale import lora_scale

__all__ = [
    "AdapterBuilder",
    "AdapterFormat",
    "Place",
    "PortableAdapter",
    "Reading",
    "ReadsInitial",
    "Row",
    "TensorError",
    "TensorFile",
    "WritesBound",
    "WritesPortable",
    "alpha_of",
    "lora_scale",
    "two_factors",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AdapterBuilder": "onnx_lora.adapters.formats.builder",
        "AdapterFormat": "onnx_lora.adapters.formats.format",
        "Place": "onnx_lora.adapters.formats.place",
        "PortableAdapter": "onnx_lora.adapters.adapter",
        "Reading": "onnx_lora.adapters.formats.files.reading",
        "ReadsInitial": "onnx_lora.adapters.formats.format",
        "Row": "onnx_lora.adapters.formats.format",
        "TensorError": "onnx_lora.adapters.problems",
        "TensorFile": "onnx_lora.adapters.formats.files.reading",
        "WritesBound": "onnx_lora.adapters.formats.format",
        "WritesPortable": "onnx_lora.adapters.formats.format",
        "alpha_of": "onnx_lora.adapters.formats.builder",
        "lora_scale": "onnx_lora.adapters.scale",
        "two_factors": "onnx_lora.adapters.formats.builder",
    },
)
