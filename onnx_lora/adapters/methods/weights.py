"""Weights as the methods compute with them: in floats wide enough, as matrices, and against the shape that a change is
for. It knows no method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx_lora.kinds import Kind
    from onnx_lora.points import Array

__all__ = ["Floats", "explain_kind", "explain_sizes", "factors_pay", "flatten_shape", "widen"]

Floats = NDArray[np.floating[Any]]


def widen(values: Array) -> Floats:
    """The values as float32, or as float64 where they are float64: half precision is too coarse to add up in."""
    wide = np.promote_types(values.dtype, np.float32)
    return values.astype(wide, copy=False)


def flatten_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The outputs and inputs of a weight as a matrix `[out, in]`: the axes of a kernel count as inputs."""
    return shape[0], math.prod(shape[1:])


def factors_pay(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether a pair of factors of this rank is no larger than the weight of this shape."""
    outputs, inputs = flatten_shape(shape)
    size_of_factors = rank * (inputs + outputs)
    return size_of_factors <= inputs * outputs


def explain_kind(method: str, kinds: str, shape: tuple[int, ...], kind: Kind) -> str:
    """The message for a weight of a kind that PEFT does not have the method for. `kinds`: those that it has it for."""
    return f"{method} is for {kinds}, and this weight of shape {shape} is {kind.noun}'s"


def explain_sizes(method: str, wanted: tuple[int, int], shape: tuple[int, ...]) -> str | None:
    """The message for a weight whose matrix has other outputs and inputs than `wanted`; None: it has these."""
    if len(shape) >= 2 and flatten_shape(shape) == wanted:
        return None
    outputs, inputs = wanted
    return f"{method} must meet a weight of {outputs} outputs and {inputs} inputs, and this one has shape {shape}"
