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

# A weight's inputs, or outputs, count as scaled where the scales' mean square distance from 1 is more than this many
# times what their standard errors account for,
_SCALED_FURTHER = 4.0

# and where the scales leave less than this part of the weight's sum of squares unexplained. Rounding to 4 bits leaves a
# hundredth.
_SCALED_REST = 0.25

# The axes of `[in, out]` that scales may lie along, and the axis that each is summed over.
_SUMMED_OVER: Mapping[Axis, int] = {"inputs": 1, "outputs": 0}


def find_scaled_axis(weight: Array, reference: Array) -> Axis | None:
    """Find the axis of `reference` `[in, out]` that was multiplied by scales which explain `weight`, as far as rounding
    lets that be told; None: neither was. The scales are those of least squares."""
    wide: NDArray[np.float64] = weight.astype(np.float64)
    known: NDArray[np.float64] = reference.astype(np.float64)
    best: Axis | None = None
    least = _SCALED_REST * float(np.square(wide).sum())
    for axis, along in _SUMMED_OVER.items():
        squares = np.square(known).sum(axis=along)
        if not squares.all():
            continue
        scales = (wide * known).sum(axis=along) / squares
        scaled = known * np.expand_dims(scales, along)
        rest = np.square(wide - scaled)
        # The squares of the scales' standard errors.
        errors = rest.sum(axis=along) / known.shape[along] / squares
        are_scaled = np.square(scales - 1.0).mean() > _SCALED_FURTHER * errors.mean()
        unexplained = float(rest.sum())
        if are_scaled and unexplained < least:
            best = axis
            least = unexplained
    return best
