"""BOFT: the inputs of a weight are rotated by a product of sparse rotations, its outputs scaled.

BOFT (Liu et al. 2024), section 4: `W = diag(s) · W0 · Bᵀ`, with B a product of butterfly factors, each a matrix of
rotations in blocks between two permutations. The reference is PEFT 0.21: `boft/layer.py`. A bias stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import flat, wide
from onnx_lora.adapters.methods.cayley import cayley, rotated
from onnx_lora.adapters.methods.method import DocsRow, Method, Module, Part, bare_parameters
from onnx_lora.adapters.methods.shapes import kernel_unlike, not_for
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["BOFT", "METHOD", "read_boft"]


@dataclass(frozen=True)
class BOFT:
    """`blocks` `[factors, blocks, b, b]`, of each of which the skew-symmetric part counts; `scale` `[out]`."""

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


def read_boft(module: Module) -> Part:
    """`boft_R` `[factors, blocks, b, b]` and `boft_s` `[out, 1]`.

    Raises TensorError: one of them is missing, or the blocks are not square.
    """
    blocks, scale = module.tensor("boft_R", 4), module.vector("boft_s")
    module.must(blocks.shape[2] == blocks.shape[3] and blocks.size > 0, "BOFT's blocks must be square")
    return Part(change=BOFT(blocks, scale))


METHOD = Method(
    peft_type="BOFT",
    name="BOFT",
    read=read_boft,
    docs=(DocsRow("`BOFT`", "fold"),),
    tensors=bare_parameters("boft_R", "boft_s"),
    fields=frozenset({"boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor"}),
)
