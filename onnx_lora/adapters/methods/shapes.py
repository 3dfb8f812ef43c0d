"""What the methods say of shapes, and changes as pairs of factors."""

from __future__ import annotations

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import flat
from onnx_lora.kinds import Kind
from onnx_lora.points import Array

__all__ = ["kernel_unlike", "not_for", "pair", "pays"]


def pays(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether factors of this rank are no larger than the weight."""
    outputs, inputs = flat(shape)
    return rank * (inputs + outputs) <= inputs * outputs


def pair(a: Array, b: Array) -> MatrixDelta:
    """`a` `[r, in]`, the axes of a kernel counted as inputs, and `b` `[out, r]`, whatever kind the module is of."""
    return MatrixDelta(a, b, 1.0)


def not_for(method: str, what: str, shape: tuple[int, ...], kind: Kind) -> str:
    """What to say where PEFT has the method for other kinds of modules."""
    return f"{method} is for {what}, and this weight of shape {shape} is {kind.noun}'s"


def kernel_unlike(method: str, wanted: tuple[int, int], shape: tuple[int, ...]) -> str | None:
    """What to say where a weight is no matrix `[out, in]` of the wanted sizes, its kernel's axes counted as inputs."""
    if len(shape) >= 2 and flat(shape) == wanted:
        return None
    return f"{method} must meet a weight of {wanted[0]} outputs and {wanted[1]} inputs, and this one has shape {shape}"
