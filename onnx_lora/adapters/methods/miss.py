"""MiSS: one block added all along the inputs. MiSS (Kang and Yin 2025), section 3; PEFT's `MissLinear`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, not_for, pair, pays, wide
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["MiSS"]


@dataclass(frozen=True)
class MiSS:
    """`block` `[r, out]`; "mini": `[r, outputs that repeat]`; "bat": `[out / r, r, r]`, which the weight multiplies."""

    block: Array
    form: Literal["plain", "mini", "bat"]

    @property
    def method(self) -> str:
        return "MiSS"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return not_for("MiSS", "linear modules", shape, kind)
        block, (outputs, inputs) = self.block.shape, shape
        if self.form == "bat":
            fits = inputs % block[-1] == 0 and outputs == block[0] * block[-1]
        elif self.form == "mini":
            fits = outputs % block[1] == 0 and inputs >= block[0]
        else:
            fits = outputs == block[1] and inputs >= block[0]
        return None if fits else f"MiSS has a block of shape {block} ({self.form}), and the weight has shape {shape}"

    def apply_to(self, weight: Array) -> Array:
        own = wide(weight)
        if self.form != "bat":
            a, b = self._factors(weight.shape)
            return own + b @ a
        size = self.block.shape[-1]
        tiles = own.reshape(len(own) // size, size, -1, size).transpose(2, 0, 1, 3)
        changed = tiles @ wide(self.block) + wide(self.block)
        return own + changed.transpose(1, 2, 0, 3).reshape(own.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        if self.form == "bat" or not pays(len(self.block), weight.shape):
            return None
        return pair(*self._factors(weight.shape))

    def output_scale(self) -> Array | None:
        return None

    def _factors(self, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
        """A adds up every r-th input."""
        block = wide(self.block)
        rank = len(block)
        a = np.tile(np.eye(rank, dtype=block.dtype), -(-shape[1] // rank))[:, : shape[1]]
        return a, np.tile(block, shape[0] // block.shape[1]).T
