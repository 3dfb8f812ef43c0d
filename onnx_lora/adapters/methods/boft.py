"""BOFT: the inputs rotated by a product of sparse rotations, the outputs scaled. BOFT (Liu et al. 2024), section 4."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.cayley import cayley, rotated
from onnx_lora.adapters.methods.shapes import flat, kernel_unlike, not_for, wide
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["BOFT"]


@dataclass(frozen=True)
class BOFT:
    """`blocks` `[factors, blocks, b, b]`, whose skew-symmetric halves count; `scale` `[out]`. A bias stays."""

    blocks: Array
    scale: Array

    @property
    def method(self) -> str:
        return "BOFT"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding):
            return not_for("BOFT", "linear modules and convolutions", shape, kind)
        factors, blocks, size, _ = self.blocks.shape
        if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
            multiple = 2 ** (factors - 1)
            return (
                f"BOFT of {factors} factors must have even blocks in multiples of {multiple}, and has {blocks} of "
                f"{size}; the weight has shape {shape}"
            )
        return kernel_unlike("BOFT", (self.scale.size, blocks * size), shape)

    def apply_to(self, weight: Array) -> Array:
        matrix = wide(weight).reshape(flat(weight.shape))
        halves = wide(self.blocks)
        skew = (halves - halves.swapaxes(2, 3)) / 2
        factors, blocks, size, _ = skew.shape
        for index, block in enumerate(skew):
            order = _butterfly(blocks * size, blocks >> index, size // 2) if factors > 1 else np.arange(blocks * size)
            mixed = rotated(matrix[:, np.argsort(order)], cayley(block))
            matrix = mixed[:, order]
        return (matrix * wide(self.scale)[:, None]).reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def _butterfly(inputs: int, groups: int, size: int) -> NDArray[np.intp]:
    """PEFT's `block_butterfly_perm`: in each of the groups, pieces of `size` with the even ones before the odd."""
    pieces = np.arange(inputs).reshape(groups, -1, size)
    return np.concatenate([pieces[:, ::2], pieces[:, 1::2]], axis=1).reshape(-1)
