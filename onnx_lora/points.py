"""The contract between exporter, adapters and runtime: what an injection point and a replaceable
weight are, and how their tensors are laid out. It knows no file, no graph and no adapter format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FLOAT_TYPES",
    "Array",
    "InjectionPoint",
    "Replaceable",
    "StoredTensor",
    "WeightPart",
    "digest",
    "matches",
]

Array = NDArray[np.generic]

# What a point's tensors may be made of. ONNX Runtime's CPU provider multiplies no bfloat16.
FLOAT_TYPES = ("float32", "float16", "float64")


def digest(weight: Array) -> str:
    """SHA-256 of a weight's values in C order, in torch's layout (`[out, in]` for Linear).

    The same number for every graph of the same base, however its exporter stored the weight.
    """
    return sha256(np.ascontiguousarray(weight).data).hexdigest()


def matches(module: str, names: Sequence[str]) -> bool:
    """Whether `module`, or a module around it, ends with one of `names`.

    PEFT's rule for `modules_to_save` (`_set_trainable`): plain suffixes, so that `classifier` takes
    `classifier.dense` with it, and `pre_classifier` too.
    """
    parts = module.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(path.endswith(name) for path in around for name in names)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of one initializer lie in a package: little-endian, C order."""

    file: str
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """In bytes."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A module's weight inside one initializer of the base graph.

    `transposed`: the initializer is stored `[out, in]`, as torch keeps a Linear weight; else
    `[in, out]`. A packed projection (q, k and v in one initializer) has one part per module:
    outputs `start` to `start + out` are the module's own.
    """

    initializer: str
    stored: StoredTensor
    transposed: bool = False
    start: int = 0

    def window(self, values: Array, outputs: int) -> Array:
        """The module's part of the initializer's values, as a view `[in, out]`."""
        by_output = values.T if self.transposed else values
        return by_output[:, self.start : self.start + outputs]


@dataclass(frozen=True, slots=True)
class InjectionPoint:
    """A place where an adapter enters a graph: `y' = y + (x · lora_A) · lora_B`.

    The graph inputs, with their shapes: `lora_a` `[rows, in, rank]` and `lora_b`
    `[rows, rank, out]`, of type `dtype`. `parts` say where W0 lies in the base graph: usually
    once, more often where a module is used by several nodes with a copy each.
    """

    module: str
    in_features: int
    out_features: int
    dtype: str
    per_row: bool
    sha256: str
    parts: tuple[WeightPart, ...]
    kind: Literal["linear"] = "linear"

    @property
    def lora_a(self) -> str:
        """The graph input `[rows, in, rank]`."""
        return f"{self.module}.lora_A.weight"

    @property
    def lora_b(self) -> str:
        """The graph input `[rows, rank, out]`, the scale multiplied in."""
        return f"{self.module}.lora_B.weight"


@dataclass(frozen=True, slots=True)
class Replaceable:
    """A whole weight that an adapter may replace, by its torch parameter name.

    role            torch's shape                          the graph input's shape
    linear_weight   `[out, in]` (`[in, out]` if in_out)    `[rows, in, out]`
    linear_bias     `[out]`                                `[rows, 1, out]`
    whole           any                                    as torch's: no rows

    `free_outputs`: an adapter may bring another number of outputs (a classifier's head).
    """

    name: str
    role: Literal["linear_weight", "linear_bias", "whole"]
    shape: tuple[int, ...]
    dtype: str
    free_outputs: bool
    per_row: bool
    sha256: str
    parts: tuple[WeightPart, ...]
    in_out: bool = False

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of torch's `shape` can take this one's place."""
        if not self.free_outputs:
            return tuple(shape) == self.shape
        if len(shape) != len(self.shape) or min(shape, default=0) < 1:
            return False
        return self.role == "linear_bias" or shape[self._in_axis] == self.shape[self._in_axis]

    @property
    def _in_axis(self) -> int:
        return 0 if self.in_out else 1

    def to_graph(self, parameter: Array) -> Array:
        """A torch parameter as the graph input takes it, with one row."""
        if self.role == "linear_weight":
            return np.ascontiguousarray(parameter if self.in_out else parameter.T)[None]
        if self.role == "linear_bias":
            return parameter[None, None, :]
        return parameter

    def to_initializer(self, value: Array, part: WeightPart) -> Array:
        """A graph input's value (one row) as the base graph's initializer stores it."""
        if self.role == "linear_weight":
            return np.ascontiguousarray(value[0].T if part.transposed else value[0])
        if self.role == "linear_bias":
            return np.ascontiguousarray(value[0, 0])
        return np.ascontiguousarray(value.T if part.transposed else value)

    def from_initializer(self, stored: Array, part: WeightPart) -> Array:
        """The base's own value as the graph input takes it, with one row."""
        if self.role == "linear_weight":
            return np.ascontiguousarray(stored.T if part.transposed else stored)[None]
        if self.role == "linear_bias":
            return stored[None, None, :]
        return np.ascontiguousarray(stored.T if part.transposed else stored)
