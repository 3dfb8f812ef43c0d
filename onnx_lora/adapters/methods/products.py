"""What LoHa and LoKr are made of: whole arrays, products of two factors, and products with a core between them.

FedPara (Hyeon-Woo et al. 2022), propositions 1 and 3; PEFT 0.21: `tuners/lycoris_utils.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.adapters.methods.weights import Floats, flatten_shape, widen

if TYPE_CHECKING:
    from onnx_lora.adapters.methods.method import Module
    from onnx_lora.points import Array

__all__ = ["LYCORIS_FIELDS", "CoredProduct", "Product", "Whole", "read_product"]

# Fields of the configs of LoHa and LoKr alike.
LYCORIS_FIELDS = frozenset(
    {"alpha", "alpha_pattern", "module_dropout", "r", "rank_dropout", "rank_pattern", "use_effective_conv2d"}
)


@dataclass(frozen=True)
class Whole:
    """`values` `[out, in, *kernel]`."""

    values: Array

    @property
    def outputs(self) -> int:
        """Of it as a matrix."""
        return len(self.values)

    @property
    def inputs(self) -> int:
        """Of it as a matrix: the axes of a kernel count as inputs."""
        return flatten_shape(self.values.shape)[1]

    @property
    def rank(self) -> int:
        """The most that a matrix of its shape can have."""
        return min(self.outputs, self.inputs)

    def matrix(self) -> Floats:
        """`[out, in · kernel]`."""
        return widen(self.values).reshape(self.outputs, -1)

    def factors(self) -> tuple[Floats, Floats]:
        """The array and an identity, `[out, rank]` and `[rank, in · kernel]`."""
        matrix = self.matrix()
        identity = np.eye(self.rank, dtype=matrix.dtype)
        return (identity, matrix) if self.outputs == self.rank else (matrix, identity)


@dataclass(frozen=True)
class Product:
    """`left` `[out, r]` times `right` `[r, in · kernel]`."""

    left: Array
    right: Array

    @property
    def outputs(self) -> int:
        """Of the product."""
        return len(self.left)

    @property
    def inputs(self) -> int:
        """Of the product: the axes of a kernel count as inputs."""
        return int(self.right.shape[1])

    @property
    def rank(self) -> int:
        """r."""
        return len(self.right)

    def matrix(self) -> Floats:
        """`[out, in · kernel]`."""
        return widen(self.left) @ widen(self.right)

    def factors(self) -> tuple[Floats, Floats]:
        """`[out, r]` and `[r, in · kernel]`."""
        return widen(self.left), widen(self.right)


@dataclass(frozen=True)
class CoredProduct:
    """A `core` `[r, r, *kernel]`, multiplied with `by_output` `[r, out]` along its first axis and with `by_input`
    `[r, in]` along its second. FedPara, proposition 3."""

    core: Array
    by_output: Array
    by_input: Array

    @property
    def outputs(self) -> int:
        """Of the product."""
        return int(self.by_output.shape[1])

    @property
    def inputs(self) -> int:
        """Of the product: the axes of a kernel count as inputs."""
        return int(self.by_input.shape[1]) * math.prod(self.core.shape[2:])

    @property
    def rank(self) -> int:
        """r."""
        return len(self.by_output)

    def matrix(self) -> Floats:
        """`[out, in · kernel]`."""
        left, right = self.factors()
        return left @ right

    def factors(self) -> tuple[Floats, Floats]:
        """`[out, r]` and `[r, in · kernel]`, the core in the second."""
        inner = np.einsum("ij...,jr->ir...", widen(self.core), widen(self.by_input))
        return widen(self.by_output).T, inner.reshape(len(inner), -1)


def read_product(module: Module, name: str, core: str | None = None) -> Product | CoredProduct:
    """The factors `NAME_a` `[out, r]` and `NAME_b` `[r, in · kernel]`; or, where the module has the tensor `core`
    `[r, r, *kernel]`, that with `NAME_a` `[r, out]` and `NAME_b` `[r, in]`.

    Raises TensorError: one of them is missing or empty, the rank is not the config's, or the shapes do not fit.
    """
    a, b = module.tensor(f"{name}_a", 2), module.tensor(f"{name}_b", 2)
    module.must_have_rank(len(b))
    module.must(a.size > 0 and b.size > 0, f"the factors of {name} must hold something")
    if core is None or not module.has(core):
        module.must(a.shape[1] == len(b), f"the factors of {name} must fit")
        return Product(a, b)
    values = module.tensor(core, 4)
    fits = len(a) == len(b) and values.shape[:2] == (len(a), len(b)) and values.size > 0
    module.must(fits, f"the factors of {core} must fit")
    return CoredProduct(values, a, b)
