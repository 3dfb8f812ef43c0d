"""A factor for each output, and nothing else: what a converted file keeps of IA3, or of DoRA without a change of
direction."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.weights import widen
from onnx_lora.kinds import Kind
from onnx_lora.points import Array

__all__ = ["OutputScale"]


@dataclass(frozen=True)
class OutputScale:
    """`W = diag(scale) · W0`, `scale` `[out]`."""

    scale: Array

    @property
    def method(self) -> str:
        return "a factor for each output"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        """Why it fits no weight of this shape, or None."""
        outputs = kind.outputs_of(shape)
        if self.scale.shape == (outputs,):
            return None
        return f"the scale of its outputs must have shape ({outputs},), and has {self.scale.shape}"

    def apply_to(self, weight: Array) -> Array:
        """The scaled weight, `[out, ...]`."""
        return widen(weight) * widen(self.scale).reshape(-1, *(1,) * (weight.ndim - 1))

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """None: no pair of factors scales outputs."""
        del weight
        return None

    def output_scale(self) -> Array | None:
        """The factors."""
        return self.scale
