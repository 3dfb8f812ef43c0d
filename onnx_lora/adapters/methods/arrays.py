"""Arrays as the methods compute with them: wide enough numbers, and weights as matrices. It knows no method."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lora.points import Array

__all__ = ["Floats", "flat", "wide"]

Floats = NDArray[np.floating[Any]]


def wide(values: Array) -> Floats:
    """As float32, or float64 where they are that: half precision is no type to add up in."""
    return values.astype(np.promote_types(values.dtype, np.float32), copy=False)


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's outputs and inputs, as of a matrix `[out, in]`: the axes of a kernel count as inputs."""
    return shape[0], math.prod(shape[1:])
