"""Rotations in blocks: how they are made of skew-symmetric matrices, and how they turn the inputs of a weight."""

from __future__ import annotations

import numpy as np

from onnx_lora.adapters.methods.weights import Floats

__all__ = ["make_rotations", "rotate_inputs"]


def make_rotations(skew: Floats) -> Floats:
    """The Cayley transform `R = (I - Q) · (I + Q)⁻¹` of each Q in `skew` `[blocks, b, b]`, solved in float64."""
    identity = np.eye(skew.shape[-1])
    # R · (I + Q) = I - Q, solved for the transpose of R.
    plus = (identity + skew).swapaxes(1, 2)
    minus = (identity - skew).swapaxes(1, 2)
    transposed = np.linalg.solve(plus, minus)
    return transposed.swapaxes(1, 2).astype(skew.dtype)


def rotate_inputs(weight: Floats, blocks: Floats) -> Floats:
    """`W · Rᵀ`: `weight` `[out, in]`, and R with `blocks` `[in / b, b, b]` on its diagonal."""
    pieces = weight.reshape(len(weight), len(blocks), -1)
    turned: Floats = np.einsum("dij,odj->odi", blocks, pieces, optimize=True)
    return turned.reshape(weight.shape)
