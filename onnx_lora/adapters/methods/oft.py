"""OFT: the inputs rotated in blocks. OFT (Qiu et al. 2023), section 4; PEFT's `OFTRotationModule`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.cayley import cayley, rotated
from onnx_lora.adapters.methods.shapes import Floats, flat, not_for, wide
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["OFT"]


@dataclass(frozen=True)
class OFT:
    """`angles` `[blocks, b · (b - 1) / 2]`, above the diagonals of skew-symmetric matrices.

    `shared`: one block for all. `terms`: of the Neumann series in the place of the inverse, or None. `bound`: COFT's
    eps, the most a block's norm may be (with √blocks), or None. `on_embedding`: an embedding's features are rotated.
    """

    angles: Array
    shared: bool
    terms: int | None
    bound: float | None
    on_embedding: bool = False

    @property
    def method(self) -> str:
        return "OFT"

    @property
    def block(self) -> int:
        """b, rows of a block."""
        return (1 + math.isqrt(1 + 8 * self.angles.shape[1])) // 2

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding) != self.on_embedding:
            return not_for("OFT of this file", "embeddings" if self.on_embedding else "other modules", shape, kind)
        if math.prod(shape[2:]) != 1:
            return (
                f"OFT on a weight of shape {shape}: PEFT adds up rotated windows that overlap, and its own merge is "
                "another thing; train another method on this convolution"
            )
        inputs = flat(shape)[1] if len(shape) > 1 else 0
        fits = inputs > 0 and inputs % self.block == 0 if self.shared else inputs == self.block * len(self.angles)
        if fits:
            return None
        blocks = "blocks" if self.shared else f"{len(self.angles)} blocks"
        return f"OFT must meet a weight whose inputs are {blocks} of {self.block}, and this one has shape {shape}"

    def apply_to(self, weight: Array) -> Array:
        blocks = self._rotations()
        matrix = wide(weight).reshape(flat(weight.shape))
        if self.shared:
            blocks = np.broadcast_to(blocks, (matrix.shape[1] // self.block, *blocks.shape[1:]))
        if self.on_embedding:
            blocks = blocks.swapaxes(1, 2)
        return rotated(matrix, blocks).reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None

    def _rotations(self) -> Floats:
        """`[blocks, b, b]`."""
        angles = wide(self.angles)
        upper = np.triu_indices(self.block, 1)
        skew = np.zeros((len(angles), self.block, self.block), angles.dtype)
        skew[:, upper[0], upper[1]] = angles
        skew -= skew.swapaxes(1, 2)
        if self.bound is not None:
            norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
            bound = self.bound / math.sqrt(len(skew))
            skew = np.where(norms <= bound, skew, skew * (bound / np.maximum(norms, bound))).astype(skew.dtype)
        return cayley(skew) if self.terms is None else _neumann(skew, self.terms)


def _neumann(skew: Floats, terms: int) -> Floats:
    """`I + 2Q + 2Q² + … + Qⁿ`, as PEFT has it since 0.18: the last of three and more powers counts once."""
    total = np.broadcast_to(np.eye(skew.shape[-1], dtype=skew.dtype), skew.shape).copy()
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total
