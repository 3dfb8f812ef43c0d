"""RandLoRA: a sum of random products of low rank, together of full rank. RandLoRA (Albert et al. 2025), equation 4."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import not_for, wide
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["RandLoRA"]


@dataclass(frozen=True)
class RandLoRA:
    """The shared `a` `[r, 1, small]` and `b` `[large, bases, r]`, as much of them as the module is wide on its smaller
    and its larger side; its own `by_rank` `[r, bases]` and `by_small` `[bases, small]`."""

    a: Array
    b: Array
    by_rank: Array
    by_small: Array
    scale: float

    @property
    def method(self) -> str:
        return "RandLoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return not_for("RandLoRA", "linear modules", shape, kind)
        small, bases = min(shape), self.by_rank.shape[1]
        if self.by_small.shape != (bases, small) or small > self.a.shape[2]:
            wanted = self.by_small.shape[1]
            return f"RandLoRA must meet a weight of {wanted} on its smaller side, and this one has shape {shape}"
        if max(shape) > len(self.b) or bases > self.b.shape[1]:
            return (
                f"RandLoRA's bases reach {self.b.shape[:2]}, and a weight of shape {shape} needs {(max(shape), bases)}"
            )
        return None

    def apply_to(self, weight: Array) -> Array:
        small, large, bases = min(weight.shape), max(weight.shape), self.by_rank.shape[1]
        own = wide(self.by_rank)[:, :, None] * wide(self.a[:, :, :small]) * wide(self.by_small)
        shared = wide(self.b[:large, :bases])
        # The one by rank and base, the other by base and rank, as PEFT multiplies them.
        product = shared.reshape(large, -1) @ own.reshape(-1, small) * wide(self.a).dtype.type(self.scale)
        return wide(weight) + (product if small == weight.shape[1] else product.T)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """Its rank is the weight's own."""
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None
