"""What every frontend hands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_lora.companions import leads_out
from onnx_lora.errors import ModelError
from onnx_lora.exporter.graph_files import Loaded
from onnx_lora.points import Array

__all__ = ["COMPANIONS", "Loaded", "Precision", "Reference", "companions_of"]

# Files that make a model usable, and that go into the package as they are.
COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "LICENSE*",
)

# JSON files that are not about the model as such.
_NOT_COMPANIONS = ("onnx_lora.json", "adapter_config.json", "trainer_state.json", "model.safetensors.index.json")


# What weights may be kept in, best first. The last two are quantized in blocks, each with a scale.
_PRECISIONS = ("fp32", "fp16", "int8", "int4")
_QUANTIZED = ("int8", "int4")

# What MatMulNBits of ONNX Runtime knows: weights in a block, and the type it multiplies in (1 float32, 2
# float16, 3 bfloat16, 4 int8: the activations are quantized too).
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_ACCURACY_LEVELS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Precision:
    """How an exporter keeps the weights. `block_size` and `accuracy_level` are None where they are floats."""

    name: str = "fp32"
    block_size: int | None = None
    accuracy_level: int | None = None

    @staticmethod
    def of(name: str, *, block_size: int | None = None, accuracy_level: int | None = None) -> Precision:
        """Quantized ones get blocks of 32 and int8 arithmetic by default: the fastest on CPUs.

        Raises ModelError: there is no such precision, or it has no such blocks.
        """
        if name not in _PRECISIONS:
            raise ModelError(f"precision must be one of {', '.join(_PRECISIONS)}, and is {name!r}")
        if name not in _QUANTIZED:
            if block_size is not None or accuracy_level is not None:
                raise ModelError(
                    f"block_size and accuracy_level are for precision int4 and int8, and precision is {name!r}"
                )
            return Precision(name)
        precision = Precision(name, block_size or 32, accuracy_level or 4)
        if block_size is not None and block_size not in _BLOCK_SIZES:
            raise ModelError(f"block_size must be one of {_BLOCK_SIZES}, and is {block_size!r}")
        if accuracy_level is not None and accuracy_level not in _ACCURACY_LEVELS:
            raise ModelError(f"accuracy_level must be one of {_ACCURACY_LEVELS}, and is {accuracy_level!r}")
        return precision

    @property
    def quantized(self) -> bool:
        return self.name in _QUANTIZED


@dataclass(frozen=True, slots=True)
class Reference:
    """What a graph must reproduce: inputs for the given names (two rows), and PyTorch's answer by output name."""

    graph: str
    feeds: Callable[[Sequence[str]], dict[str, Array]]
    answer: Callable[[], dict[str, Array]]


def companions_of(folder: Path) -> tuple[Path, ...]:
    """The configuration and tokenizer files of a model's folder. Raises ModelError: one is a link out of it."""
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    companions = sorted(file for file in found if file.name not in _NOT_COMPANIONS)
    if outside := [f"{file.name} → {file.resolve()}" for file in companions if leads_out(file, folder)]:
        raise ModelError(
            "what comes along into the package must lie in the model's folder; put copies in the place of these links",
            path=folder,
            problems=outside,
        )
    return tuple(companions)
