"""The order in which llama.cpp keeps the rows of q and k in some architectures, and factors in that order. It knows no
file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx_lora.adapters.adapter import Change, Delta, MatrixDelta
from onnx_lora.kinds import Kind
from onnx_lora.points import Array

__all__ = ["InterleavedRows", "count_heads", "rows_interleaved", "rows_of_halves"]


@dataclass(frozen=True)
class InterleavedRows:
    """A delta whose B has its rows in llama.cpp's order, as long as nobody knows the number of heads.

    `heads`: the field of Hugging Face's config that says it, "num_attention_heads" or "num_key_value_heads".
    """

    interleaved: Delta
    heads: str

    @property
    def method(self) -> str:
        return "LoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        del shape, kind
        return (
            "llama.cpp orders the outputs of this module by heads, and neither the file nor the package's config.json "
            f"says how many there are ({self.heads}); put the model's config.json into the package's folder"
        )

    def apply_to(self, weight: Array) -> Array:
        raise NotImplementedError

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None

    def tensors(self) -> Mapping[str, Array]:
        return {"lora_a": self.interleaved.a, "lora_b": self.interleaved.b}

    def with_config(self, config: Mapping[str, Any]) -> Delta | Change:
        """The delta in PyTorch's order, by Hugging Face's `config` of the model; itself where that says too little."""
        known = self.with_heads(count_heads(config, self.heads))
        return self if known is None else known

    def with_heads(self, count: int) -> Delta | None:
        """The delta in PyTorch's order; None: the outputs are no such number of heads."""
        b = self.interleaved.b
        if count < 1 or len(b) % (2 * count):
            return None
        return Delta(self.interleaved.a, rows_of_halves(b, count), self.interleaved.scale)


def count_heads(config: Mapping[str, Any], field: str) -> int:
    """The number in a field of Hugging Face's config, or 0. Keys and values have as many heads as queries where the
    config does not say."""
    count = config.get(field, config.get("num_attention_heads"))
    return count if type(count) is int else 0


def rows_of_halves(b: Array, heads: int) -> Array:
    """`[out, r]` in PyTorch's order: each head's first half, then its second. Undoes `rows_interleaved`."""
    return b.reshape(heads, len(b) // heads // 2, 2, -1).swapaxes(1, 2).reshape(b.shape)


def rows_interleaved(b: Array, heads: int) -> Array:
    """`[out, r]` in llama.cpp's order: `LlamaModel.permute` of its converter."""
    return b.reshape(heads, 2, len(b) // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)
