"""BOFT: the inputs of a weight are rotated by a product of sparse rotations, its outputs scaled.

BOFT (Liu et al. 2024), section 4: `W = diag(s) · W0 · Bᵀ`, with B a product of butterfly factors, each a matrix of
rotations in blocks between two permutations. The reference is PEFT 0.21: `boft/layer.py`. A bias stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.rotations import make_rotations, rotate_inputs
from onnx_lora.adapters.methods.weights import explain_kind, explain_sizes, flatten_shape, widen
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["BOFT", "METHOD", "read_boft"]


@dataclass(frozen=True)
class BOFT:
    """`blocks` `[factors, blocks, b, b]`, of which only the skew-symmetric parts count; `scale` `[out]`."""

    blocks: Array
    scale: Array

    @property
    def method(self) -> str:
        return "BOFT"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding):
            return explain_kind("BOFT", "linear modules and convolutions", shape, kind)
        factors, blocks, size, _ = self.blocks.shape
        multiple = 2 ** (factors - 1)
        are_even = size % 2 == 0 and blocks % multiple == 0
        if factors > 1 and not are_even:
            return (
                f"BOFT of {factors} factors must have even blocks in multiples of {multiple}, and has {blocks} of "
                f"{size}; the weight has shape {shape}"
            )
        return explain_sizes("BOFT", (self.scale.size, blocks * size), shape)

    def apply_to(self, weight: Array) -> Array:
        matrix = widen(weight).reshape(flatten_shape(weight.shape))
        halves = widen(self.blocks)
        skew = (halves - halves.swapaxes(2, 3)) / 2
        factors, blocks, size, _ = skew.shape
        inputs = blocks * size
        for index, factor in enumerate(skew):
            order = np.arange(inputs)
            if factors > 1:
                order = _butterfly(inputs, groups=blocks >> index, size=size // 2)
            permuted = matrix[:, np.argsort(order)]
            rotated = rotate_inputs(permuted, make_rotations(factor))
            matrix = rotated[:, order]
        scaled = matrix * widen(self.scale)[:, None]
        return scaled.reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def _butterfly(inputs: int, groups: int, size: int) -> NDArray[np.intp]:
    """PEFT's `block_butterfly_perm`: an order of the inputs. Each of the groups is made of pieces of `size` inputs, and
    has the even ones of them before the odd ones."""
    pieces = np.arange(inputs).reshape(groups, -1, size)
    even = pieces[:, ::2]
    odd = pieces[:, 1::2]
    return np.concatenate([even, odd], axis=1).reshape(-1)


def read_boft(module: Module) -> Contribution:
    """`boft_R` `[factors, blocks, b, b]` and `boft_s` `[out, 1]`.

    Raises TensorError: one of them is missing, or the blocks are not square.
    """
    blocks = module.tensor("boft_R", 4)
    scale = module.vector("boft_s")
    module.must(blocks.shape[2] == blocks.shape[3] and blocks.size > 0, "BOFT's blocks must be square")
    return Contribution(change=BOFT(blocks, scale))


METHOD = Method(
    peft_type="BOFT",
    name="BOFT",
    read=read_boft,
    docs=(DocsRow("`BOFT`", "fold"),),
    tensors=bare_parameters("boft_R", "boft_s"),
    fields=frozenset({"boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor"}),
)
