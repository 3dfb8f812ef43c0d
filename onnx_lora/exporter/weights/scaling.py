"""Whether one weight is another with an axis scaled, as SmoothQuant, AWQ and folded norms leave it. It knows arrays
alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lora.points import Array

__all__ = ["Axis", "find_scaled_axis"]

Axis = Literal["inputs", "outputs"]

# A weight's inputs, or outputs, count as scaled where the scales are so many times further from 1 (mean square) than
# what they leave unexplained would put them, and that is no larger part of the whole (a sum of squares: rounding to 4
# bits leaves a hundredth).
_SCALED_FURTHER = 4.0
_SCALED_REST = 0.25

# The axes of `[in, out]` that scales may lie along, and the axis that each is summed over.
_SUMMED_OVER: Mapping[Axis, int] = {"inputs": 1, "outputs": 0}


def find_scaled_axis(weight: Array, reference: Array) -> Axis | None:
    """Which axis of `reference` `[in, out]` was multiplied by scales that explain `weight`, as far as rounding lets
    that be told; None: neither. The scales are those of least squares."""
    wide: NDArray[np.float64] = weight.astype(np.float64)
    known: NDArray[np.float64] = reference.astype(np.float64)
    best: Axis | None = None
    least = _SCALED_REST * float(np.square(wide).sum())
    for axis, along in _SUMMED_OVER.items():
        squares = np.square(known).sum(axis=along)
        if not squares.all():
            continue
        scales = (wide * known).sum(axis=along) / squares
        rest = np.square(wide - known * np.expand_dims(scales, along))
        errors = rest.sum(axis=along) / known.shape[along] / squares  # squares of the standard errors of scales
        unexplained = float(rest.sum())
        if np.square(scales - 1.0).mean() > _SCALED_FURTHER * errors.mean() and unexplained < least:
            best, least = axis, unexplained
    return best
