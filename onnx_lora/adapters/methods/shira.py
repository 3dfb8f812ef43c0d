"""SHiRA: a few numbers of the weight are changed. SHiRA (Bhardwaj et al. 2024), section 3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import not_for, wide
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["SHiRA"]


@dataclass(frozen=True)
class SHiRA:
    """`values` `[n]` added at `places` `[2, n]`: outputs and inputs."""

    places: Array
    values: Array

    @property
    def method(self) -> str:
        return "SHiRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return not_for("SHiRA", "linear modules", shape, kind)
        places = self.places.astype(np.int64)
        if places.size and (places.min() < 0 or (places.max(axis=1) >= shape).any()):
            most = tuple(int(place) for place in places.max(axis=1))
            return f"SHiRA's places must lie in a weight of shape {shape}, and reach {most} (from {places.min()})"
        return None

    def apply_to(self, weight: Array) -> Array:
        merged = wide(weight).copy()
        outputs, inputs = self.places.astype(np.int64)
        np.add.at(merged, (outputs, inputs), wide(self.values))
        return merged

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None
