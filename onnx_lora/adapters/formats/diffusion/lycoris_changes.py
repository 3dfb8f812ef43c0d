"""Changes of a weight that only LyCORIS' and kohya's files hold. They know no file.

The reference is LyCORIS 4.1: `modules/*.py`, `functional/*.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import Change, HasTensors, MatrixDelta
from onnx_lora.adapters.methods.weights import flatten_shape, widen
from onnx_lora.kinds import Kind
from onnx_lora.points import Array

__all__ = ["Decomposed", "Difference", "Product"]


@dataclass(frozen=True)
class Difference:
    """`W = W0 + diff`: LyCORIS' "full"."""

    diff: Array

    @property
    def method(self) -> str:
        return "full difference"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        del kind
        if self.diff.shape == shape:
            return None
        return f"the difference must have the weight's shape {shape}, and has {self.diff.shape}"

    def apply_to(self, weight: Array) -> Array:
        return widen(weight) + widen(self.diff)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None

    def tensors(self) -> Mapping[str, Array]:
        return {"diff": self.diff}


@dataclass(frozen=True)
class Product:
    """`W = W0 + scale · b · a`, `a` `[r, in · kernel]`: LoRA where it must be a change."""

    a: Array
    b: Array
    scale: float

    @property
    def method(self) -> str:
        return "LoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        del kind
        if flatten_shape(shape) == (len(self.b), self.a.shape[1]):
            return None
        return f"the factors {self.a.shape} and {self.b.shape} must fit the weight's shape {shape}"

    def apply_to(self, weight: Array) -> Array:
        change = widen(self.b) @ widen(self.a) * np.float32(self.scale)
        return widen(weight) + change.reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return MatrixDelta(self.a, self.b, self.scale)

    def output_scale(self) -> Array | None:
        return None

    def tensors(self) -> Mapping[str, Array]:
        return {"lora_down": self.a, "lora_up": self.b}


@dataclass(frozen=True)
class Decomposed:
    """DoRA on any change: its weight with the norm of each output, or of each input, set to `magnitude`.

    LyCORIS' `weight_decompose`, which adds the smallest float to the norms.
    """

    inner: Change
    magnitude: Array
    by_input: bool

    @property
    def method(self) -> str:
        return f"DoRA by inputs of {self.inner.method}" if self.by_input else f"DoRA of {self.inner.method}"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        misfit = self.inner.explain_misfit(shape, kind)
        if misfit is not None:
            return misfit
        if self.by_input:
            wanted, what = shape[1], "inputs"
        else:
            wanted, what = shape[0], "outputs"
        if self.magnitude.size == wanted:
            return None
        return f"dora_scale must have one value for each of the weight's {wanted} {what}, and has {self.magnitude.size}"

    def apply_to(self, weight: Array) -> Array:
        total = widen(self.inner.apply_to(weight))
        axis = 1 if self.by_input else 0
        others = tuple(index for index in range(total.ndim) if index != axis)
        squares = np.square(total, dtype=np.float64).sum(axis=others, keepdims=True)
        norms = np.sqrt(squares) + np.finfo(np.float32).eps
        scale = widen(self.magnitude).reshape(norms.shape) / norms
        changed: Array = (total * scale).astype(total.dtype)
        return changed

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None

    def tensors(self) -> Mapping[str, Array]:
        inner = self.inner.tensors() if isinstance(self.inner, HasTensors) else {}
        return {**inner, "dora_scale": self.magnitude}
