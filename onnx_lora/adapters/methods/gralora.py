"""GraLoRA: each block of the weight has factors of its own. GraLoRA (Jung et al. 2025), section 3.2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, kernel_unlike, not_for, pair, pays, wide
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["GraLoRA"]


@dataclass(frozen=True)
class GraLoRA:
    """`a` `[n, in / n, r]`, `b` `[n, r, out / n]`: block (j, i) of the weight, `[out / n, in / n]`, is made of r / n
    columns of a[i] and of b[j]. `general`: a pair `[h, in]`, `[out, h]` for the whole weight, or nothing."""

    a: Array
    b: Array
    general: tuple[Array, ...]
    scale: float

    @property
    def method(self) -> str:
        return "GraLoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear):
            return not_for("GraLoRA", "linear modules", shape, kind)
        return kernel_unlike("GraLoRA", (len(self.b) * self.b.shape[2], len(self.a) * self.a.shape[1]), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._blocks()
        product: Floats = np.einsum("nijt,jnto->joni", a, b, optimize=True)
        change = product.reshape(weight.shape)
        if self.general:
            change = change + wide(self.general[1]) @ wide(self.general[0])
        return wide(weight) + change * np.float32(self.scale)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """One column for each input block, output block and rank of theirs."""
        n, part = len(self.a), self.a.shape[2]
        hybrid = len(self.general[0]) if self.general else 0
        if not pays(n * part + hybrid, weight.shape):
            return None
        blocks_a, blocks_b = self._blocks()
        each = np.eye(n, dtype=blocks_a.dtype)
        a = np.einsum("nijt,nm->njtmi", blocks_a, each).reshape(n * part, weight.shape[1])
        b = np.einsum("jnto,jk->konjt", blocks_b, each).reshape(weight.shape[0], n * part)
        if self.general:
            a, b = np.concatenate([a, wide(self.general[0])]), np.concatenate([b, wide(self.general[1])], axis=1)
        return pair(a, b * np.float32(self.scale))

    def output_scale(self) -> Array | None:
        return None

    def _blocks(self) -> tuple[Floats, Floats]:
        """`[n, in / n, n, r / n]` by input block, input, output block; `[n, n, r / n, out / n]` by output and input
        block."""
        n, inputs, rank = self.a.shape
        a = wide(self.a).reshape(n, inputs, n, rank // n)
        return a, wide(self.b).reshape(n, n, rank // n, -1)
