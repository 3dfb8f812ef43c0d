"""BD-LoRA: A or B in blocks on a diagonal. BD-LoRA (Wang et al. 2025), section 3; PEFT's `BlockDiagonalLinear`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, kernel_unlike, not_for, pair, pays, wide
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["BDLoRA"]


@dataclass(frozen=True)
class BDLoRA:
    """`a` `[r, in]` and `b` `[out, r]`; the one of the two that lies in blocks has 1 / `blocks` of the columns."""

    a: Array
    b: Array
    scale: float
    blocks: int
    in_a: bool

    @property
    def method(self) -> str:
        return "BD-LoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear):
            return not_for("BD-LoRA", "linear modules", shape, kind)
        inputs = self.a.shape[1] * (self.blocks if self.in_a else 1)
        return kernel_unlike("BD-LoRA", (len(self.b), inputs), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors()
        return wide(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return pair(*self._factors()) if pays(len(self.a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self) -> tuple[Floats, Floats]:
        a, b = wide(self.a), wide(self.b) * np.float32(self.scale)
        return (_diagonal(a, self.blocks), b) if self.in_a else (a, _diagonal(b, self.blocks))


def _diagonal(factor: Floats, blocks: int) -> Floats:
    each = factor.reshape(blocks, len(factor) // blocks, -1)
    placed = np.einsum("krc,kj->krjc", each, np.eye(blocks, dtype=factor.dtype))
    expanded: Floats = placed.reshape(len(factor), -1)
    return expanded
