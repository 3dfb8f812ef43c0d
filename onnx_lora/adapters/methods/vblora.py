"""VB-LoRA: factors put together from a bank of vectors. VB-LoRA (Li et al. 2024), equations 3 and 4."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, kernel_unlike, not_for, pair, pays, wide
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["VBLoRA"]


@dataclass(frozen=True)
class VBLoRA:
    """`bank` `[vectors, length]`. Which vectors of it, and how much of each: `chosen_a` and `share_a`
    `[r, in / length, k]`, `chosen_b` and `share_b` `[out / length, r, k]`."""

    bank: Array
    chosen_a: Array
    share_a: Array
    chosen_b: Array
    share_b: Array

    @property
    def method(self) -> str:
        return "VB-LoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear):
            return not_for("VB-LoRA", "linear modules", shape, kind)
        length = self.bank.shape[1]
        return kernel_unlike("VB-LoRA", (len(self.chosen_b) * length, self.chosen_a.shape[1] * length), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors()
        return wide(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return pair(*self._factors()) if pays(len(self.chosen_a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self) -> tuple[Floats, Floats]:
        a, b = self._mixed(self.chosen_a, self.share_a), self._mixed(self.chosen_b, self.share_b)
        return a.reshape(len(a), -1), b.swapaxes(1, 2).reshape(-1, b.shape[1])

    def _mixed(self, chosen: Array, share: Array) -> Floats:
        """`[..., length]`."""
        vectors = wide(self.bank[chosen.astype(np.int64)])
        mixed: Floats = np.einsum("...k,...kl->...l", wide(share), vectors)
        return mixed
