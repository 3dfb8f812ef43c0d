"""The numbers that weights are kept in: floats, or integers in blocks that share a scale. It holds the limits of
quantization for every exporter, and quantizes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx_lora.boundary import public
from onnx_lora.errors import ModelError

__all__ = ["ACCURACY_LEVELS", "BLOCK_BITS", "BLOCK_SIZES", "Precision", "check_blocks"]

# What MatMulNBits of ONNX Runtime knows: bits of a weight, and weights that share a scale.
BLOCK_BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)

# The type that its kernel multiplies in, by the number that stands in the graph. 4 rounds activations too.
ACCURACY_LEVELS: Mapping[int, str] = {0: "as the kernel likes", 1: "float32", 2: "float16", 3: "bfloat16", 4: "int8"}

# What weights may be kept in, most exact first; the bits of those that are quantized in blocks.
_BITS: Mapping[str, int | None] = {"fp32": None, "fp16": None, "int8": 8, "int4": 4}

# The fastest on CPUs.
_DEFAULT_BLOCK_SIZE = 32
_DEFAULT_ACCURACY_LEVEL = 4


@public
@dataclass(frozen=True)
class Precision:
    """How an exporter keeps the weights.

    `name`: "fp32", "fp16", "int8" or "int4"; the last two are symmetric integers in blocks.
    `block_size`: how many weights along the inputs share a scale: 16, 32 (the default), 64, 128 or 256.
    `accuracy_level`: the arithmetic of quantized products: 4 (the default) multiplies in int8, which rounds
        activations too and is the fastest; 1 in float32, 2 in float16, 3 in bfloat16; 0 leaves it to the kernel.

    Both numbers are None where the weights are floats.

    Raises ModelError: there is no such precision, or it has no such blocks.
    """

    name: str = "fp32"
    block_size: int | None = None
    accuracy_level: int | None = None

    def __post_init__(self) -> None:
        if self.name not in tuple(_BITS):
            raise ModelError(f"precision must be one of {', '.join(_BITS)}, and is {self.name!r}")
        if not self.quantized:
            if self.block_size is not None or self.accuracy_level is not None:
                raise ModelError(
                    f"block_size and accuracy_level are for precision int4 and int8, and precision is {self.name!r}"
                )
            return
        if self.block_size is None:
            object.__setattr__(self, "block_size", _DEFAULT_BLOCK_SIZE)
        if self.accuracy_level is None:
            object.__setattr__(self, "accuracy_level", _DEFAULT_ACCURACY_LEVEL)
        check_blocks(self.block_size, self.accuracy_level)

    @property
    def quantized(self) -> bool:
        """Whether weights are integers in blocks."""
        return _BITS[self.name] is not None


def check_blocks(block_size: object, accuracy_level: object) -> None:
    """Raises ModelError: MatMulNBits knows no such blocks, or no such arithmetic."""
    if block_size not in BLOCK_SIZES:
        raise ModelError(f"block_size must be one of {_listed(BLOCK_SIZES)}, and is {block_size!r}")
    if accuracy_level not in tuple(ACCURACY_LEVELS):
        raise ModelError(f"accuracy_level must be one of {_listed(tuple(ACCURACY_LEVELS))}, and is {accuracy_level!r}")


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
