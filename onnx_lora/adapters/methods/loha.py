"""LoHa: the elementwise product of two products of low rank. LoHa (Hyeon-Woo et al. 2022, FedPara), proposition 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, columns, kernel_unlike, not_for, pair, pays, rows, thin, wide
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["LoHa"]


@dataclass(frozen=True)
class LoHa:
    """`W = W0 + scale · left ∘ right`, each a product: of `[out, r]` and `[r, in · kernel]`, or by modes (`thin`)."""

    left: tuple[Array, ...]
    right: tuple[Array, ...]
    scale: float

    @property
    def method(self) -> str:
        return "LoHa"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding):
            return not_for("LoHa", "linear modules and convolutions", shape, kind)
        return kernel_unlike("LoHa", (rows(self.left), columns(self.left)), shape)

    def apply_to(self, weight: Array) -> Array:
        (b1, a1), (b2, a2) = thin(self.left), thin(self.right)
        change: Floats = (b1 @ a1) * (b2 @ a2) * np.float32(self.scale)
        return wide(weight) + change.reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """Of the product of both ranks: every column of one with every column of the other."""
        rank = len(self.left[-1]) * len(self.right[-1])
        if not pays(rank, weight.shape):
            return None
        (b1, a1), (b2, a2) = thin(self.left), thin(self.right)
        a = (a1[:, None] * a2[None]).reshape(rank, -1)
        b = (b1[:, :, None] * b2[:, None]).reshape(-1, rank)
        return pair(a, b * np.float32(self.scale))

    def output_scale(self) -> Array | None:
        return None
