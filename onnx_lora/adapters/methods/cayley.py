"""Blocks of rotations: the Cayley transform of skew-symmetric matrices, and blocks applied to a weight's inputs."""

from __future__ import annotations

import numpy as np

from onnx_lora.adapters.methods.arrays import Floats

__all__ = ["cayley", "rotated"]


def cayley(skew: Floats) -> Floats:
    """`(I - Q) · (I + Q)⁻¹` of `skew` `[blocks, b, b]`, solved in float64."""
    identity = np.eye(skew.shape[-1])
    solved = np.linalg.solve((identity + skew).swapaxes(1, 2), (identity - skew).swapaxes(1, 2))
    return solved.swapaxes(1, 2).astype(skew.dtype)


def rotated(weight: Floats, blocks: Floats) -> Floats:
    """`weight` `[out, in]` times the transpose of the blocks `[in / b, b, b]` on a diagonal."""
    parts = weight.reshape(len(weight), len(blocks), -1)
    turned: Floats = np.einsum("dij,odj->odi", blocks, parts, optimize=True)
    return turned.reshape(weight.shape)
