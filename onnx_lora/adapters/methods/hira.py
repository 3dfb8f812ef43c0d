"""HiRA: each number of the weight is changed in proportion to itself. HiRA (Huang et al. 2025), equation 3."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import kernel_unlike, not_for, wide
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["HiRA"]


@dataclass(frozen=True)
class HiRA:
    """`W = W0 + W0 ∘ (b · a)`: `a` `[r, in · kernel]`, `b` `[out, r]`; of an embedding `[r, rows]`, `[features, r]`."""

    a: Array
    b: Array
    on_embedding: bool = False

    @property
    def method(self) -> str:
        return "HiRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding) != self.on_embedding:
            return not_for("HiRA of this file", "embeddings" if self.on_embedding else "other modules", shape, kind)
        sizes = (len(self.b), self.a.shape[1])
        return kernel_unlike("HiRA", sizes[::-1] if self.on_embedding else sizes, shape)

    def apply_to(self, weight: Array) -> Array:
        own, share = wide(weight), wide(self.b) @ wide(self.a)
        return own + own * (share.T if self.on_embedding else share).reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None
