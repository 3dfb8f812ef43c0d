"""Package and adapters in, outputs out: per call (`AdapterSession`), or folded in before a session starts; and text
(`TextGenerator`).

It needs numpy and onnxruntime. Only writing or resizing a graph loads `onnx`, and only then; only text loads
`tokenizers`, and only a chat `jinja2`. Its names are loaded when they are first used."""

from __future__ import annotations

from onnx_lora.lazy import lazy_names

TYPE_CHECKING = False  # a name that checkers know; importing it takes longer than all else here
if TYPE_CHECKING:
    from onnx_lora.runtime.folding import fold
    from onnx_lora.runtime.generation.cache import Cache
    from onnx_lora.runtime.generation.chat import Chat
    from onnx_lora.runtime.generation.generator import TextGenerator
    from onnx_lora.runtime.generation.results import Generation, Piece
    from onnx_lora.runtime.generation.sampling import Sampling
    from onnx_lora.runtime.generation.stream import Stream
    from onnx_lora.runtime.measurement import Advice, CallTimes, GraphMeasurement, Measurement
    from onnx_lora.runtime.measuring import measure
    from onnx_lora.runtime.requantize import Requantize, Rounding
    from onnx_lora.runtime.session import AdapterSession
    from onnx_lora.runtime.standalone import fold_to, read_folded

__all__ = [
    "AdapterSession",
    "Advice",
    "Cache",
    "CallTimes",
    "Chat",
    "Generation",
    "GraphMeasurement",
    "Measurement",
    "Piece",
    "Requantize",
    "Rounding",
    "Sampling",
    "Stream",
    "TextGenerator",
    "fold",
    "fold_to",
    "measure",
    "read_folded",
]

if not TYPE_CHECKING:  # so that checkers report names that are not there
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "fold": "onnx_lora.runtime.folding",
            "Cache": "onnx_lora.runtime.generation.cache",
            "Chat": "onnx_lora.runtime.generation.chat",
            "Generation": "onnx_lora.runtime.generation.results",
            "Piece": "onnx_lora.runtime.generation.results",
            "Stream": "onnx_lora.runtime.generation.stream",
            "Sampling": "onnx_lora.runtime.generation.sampling",
            "TextGenerator": "onnx_lora.runtime.generation.generator",
            "Advice": "onnx_lora.runtime.measurement",
            "CallTimes": "onnx_lora.runtime.measurement",
            "GraphMeasurement": "onnx_lora.runtime.measurement",
            "Measurement": "onnx_lora.runtime.measurement",
            "measure": "onnx_lora.runtime.measuring",
            "Requantize": "onnx_lora.runtime.requantize",
            "Rounding": "onnx_lora.runtime.requantize",
            "AdapterSession": "onnx_lora.runtime.session",
            "fold_to": "onnx_lora.runtime.standalone",
            "read_folded": "onnx_lora.runtime.standalone",
        },
    )
