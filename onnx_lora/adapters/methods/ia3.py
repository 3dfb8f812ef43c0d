"""IA3: a factor for every output, or for every input. (IA)³ (Liu et al. 2022), section 3.3."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import not_for, wide
from onnx_lora.kinds import Conv, Embedding, Kind
from onnx_lora.points import Array

__all__ = ["IA3"]


@dataclass(frozen=True)
class IA3:
    """`vector` `[out]`; of a feed-forward module `[in]`, of a convolution `[channels]`. A bias is scaled apart."""

    vector: Array
    feedforward: bool

    @property
    def method(self) -> str:
        return "IA3"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding) or len(shape) < 2:
            return not_for("IA3", "linear modules and convolutions", shape, kind)
        size = self.vector.size
        if not self.feedforward:
            wanted, fits = "outputs", size == shape[0]
        else:
            groups = size // shape[1] if shape[1] and size % shape[1] == 0 else 0
            wanted, fits = "inputs", groups == 1 or (isinstance(kind, Conv) and groups > 1 and shape[0] % groups == 0)
        return None if fits else f"IA3 must meet a weight of {size} {wanted}, and this one has shape {shape}"

    def apply_to(self, weight: Array) -> Array:
        vector, kernel = wide(self.vector), (1,) * (weight.ndim - 2)
        if not self.feedforward:
            return wide(weight) * vector.reshape(-1, 1, *kernel)
        groups = vector.size // weight.shape[1]
        by_group = vector.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
        return wide(weight) * by_group.reshape(*weight.shape[:2], *kernel)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None if self.feedforward else wide(self.vector)
