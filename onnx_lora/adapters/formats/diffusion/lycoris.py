"""What LyCORIS files hold beside plain factors: a module's tensors as a change. It knows no file and no module's name.

The reference is LyCORIS 4.1: `modules/*.py`, `functional/*.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import Change, MatrixDelta
from onnx_lora.adapters.formats.builder import as_matrix
from onnx_lora.adapters.methods.loha import LoHa
from onnx_lora.adapters.methods.lokr import LoKr
from onnx_lora.adapters.methods.shapes import columns, rows, wide
from onnx_lora.kinds import Kind
from onnx_lora.points import Array

__all__ = ["Decomposed", "Difference", "ModuleError", "Product", "decomposed", "loha", "lokr"]


class ModuleError(Exception):
    """Tensors of a module that make no sense together; the text says which and why."""


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
        return wide(weight) + wide(self.diff)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


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
        if shape[0] == len(self.b) and int(np.prod(shape[1:])) == self.a.shape[1]:
            return None
        return f"the factors {self.a.shape} and {self.b.shape} must fit the weight's shape {shape}"

    def apply_to(self, weight: Array) -> Array:
        return wide(weight) + (wide(self.b) @ wide(self.a) * np.float32(self.scale)).reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return MatrixDelta(self.a, self.b, self.scale)

    def output_scale(self) -> Array | None:
        return None


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
        if wrong := self.inner.explain_misfit(shape, kind):
            return wrong
        wanted, what = (shape[1], "inputs") if self.by_input else (shape[0], "outputs")
        if self.magnitude.size == wanted:
            return None
        return f"dora_scale must have one value for each of the weight's {wanted} {what}, and has {self.magnitude.size}"

    def apply_to(self, weight: Array) -> Array:
        total = wide(self.inner.apply_to(weight))
        axis = 1 if self.by_input else 0
        others = tuple(index for index in range(total.ndim) if index != axis)
        norms = np.sqrt(np.square(total, dtype=np.float64).sum(axis=others, keepdims=True)) + np.finfo(np.float32).eps
        shape = tuple(-1 if index == axis else 1 for index in range(total.ndim))
        merged: Array = (total * (wide(self.magnitude).reshape(shape) / norms)).astype(total.dtype)
        return merged

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def decomposed(change: Change, dora_scale: Array) -> Decomposed:
    """`dora_scale` is `[out, 1, …]` or, of `wd_on_output=False`, `[1, in, 1, …]`. Raises ModuleError."""
    matrix = as_matrix(dora_scale)
    if matrix is None or 1 not in matrix.shape or not matrix.size:
        raise ModuleError(f"dora_scale must have shape [out, 1] or [1, in], and has {dora_scale.shape}")
    return Decomposed(change, matrix.reshape(-1), by_input=matrix.shape[1] != 1)


def loha(tensors: Mapping[str, Array], alpha: float | None) -> LoHa:
    """Raises ModuleError."""
    left, right = (_product(tensors, f"hada_w{side}", f"hada_t{side}") for side in "12")
    if (rows(left), columns(left)) != (rows(right), columns(right)):
        raise ModuleError("the two products of LoHa must have one shape")
    rank = len(left[-1])
    return LoHa(left, right, 1.0 if alpha is None else alpha / rank)


def lokr(tensors: Mapping[str, Array], alpha: float | None) -> LoKr:
    """With both parts whole there is no rank, and alpha does not count. Raises ModuleError."""
    first = _whole(tensors, "lokr_w1") or _product(tensors, "lokr_w1", "")
    second = _whole(tensors, "lokr_w2") or _product(tensors, "lokr_w2", "lokr_t2")
    ranks = {len(part[-1]) for part in (first, second) if len(part) > 1}
    if len(ranks) > 1:
        raise ModuleError(f"the factors of LoKr must have one rank, and have {sorted(ranks)}")
    return LoKr(first, second, 1.0 if alpha is None or not ranks else alpha / ranks.pop())


def _whole(tensors: Mapping[str, Array], name: str) -> tuple[Array, ...]:
    values = tensors.get(name)
    if values is None:
        return ()
    if f"{name}_a" in tensors or f"{name}_b" in tensors or values.ndim < 2 or not values.size:
        raise ModuleError(f"{name} must be whole, with 2 axes or more, or made of factors")
    return (values,)


def _product(tensors: Mapping[str, Array], name: str, core: str) -> tuple[Array, ...]:
    """A pair, `[out, r]` and `[r, in · kernel]`; or a core with a factor for each mode, `[r, out]` and `[r, in]`."""
    missing = [f"{name}_{side}" for side in "ab" if f"{name}_{side}" not in tensors]
    if missing:
        raise ModuleError(f"has no {' and no '.join(missing)}; get the whole file")
    w_a, w_b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if w_a.ndim < 2 or w_b.ndim < 2 or not w_a.size or not w_b.size:
        raise ModuleError(
            f"the factors of {name} must have 2 axes or more, and have shapes {w_a.shape} and {w_b.shape}"
        )
    if core not in tensors:
        a, b = w_a.reshape(len(w_a), -1), w_b.reshape(len(w_b), -1)
        if a.shape[1] != len(b):
            raise ModuleError(f"the factors of {name} must have one rank, and have shapes {w_a.shape} and {w_b.shape}")
        return a, b
    values = tensors[core]
    if values.ndim < 3 or values.shape[:2] != (len(w_a), len(w_b)) or w_a.ndim != 2 or w_b.ndim != 2:
        raise ModuleError(f"{core} {values.shape} must fit the factors {w_a.shape} and {w_b.shape}")
    return values, w_a, w_b
