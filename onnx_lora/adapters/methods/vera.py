"""VeRA: two random matrices shared by all modules, two vectors for each. VeRA (Kopiczko et al. 2024), equation 2."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, flat, not_for, pair, pays, wide
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["VeRA"]


@dataclass(frozen=True)
class VeRA:
    """`W = W0 + diag(by_output) · B · diag(by_rank) · A`, of the shared matrices as much as the module is wide.

    `a` `[r, most inputs]`, `b` `[most outputs, r]`, `by_rank` `[r]`, `by_output` `[out]`.
    """

    a: Array
    b: Array
    by_rank: Array
    by_output: Array
    name: str = "VeRA"

    @property
    def method(self) -> str:
        return self.name

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return not_for(self.name, "linear modules", shape, kind)
        most = (len(self.b), self.a.shape[1])
        if shape[0] != self.by_output.size or shape[0] > most[0] or shape[1] > most[1]:
            return (
                f"{self.name} must meet a weight of {self.by_output.size} outputs, within the shape {most} of its "
                f"projections, and this one has shape {shape}"
            )
        return None

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors(weight.shape)
        return wide(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return pair(*self._factors(weight.shape)) if pays(len(self.a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
        outputs, inputs = flat(shape)
        a = wide(self.by_rank)[:, None] * wide(self.a[:, :inputs])
        return a, wide(self.by_output)[:, None] * wide(self.b[:outputs])
