"""HRA: the inputs of a weight are reflected, once for each trained column.

HRA (Yuan et al. 2024), section 3.1: `W = W0 · H1 · … · Hr`, with the Householder reflections `H = I - 2uuᵀ / uᵀu`; with
`apply_GS` the columns u are made orthogonal first. The reference is PEFT 0.21: `hra/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import (
    Floats,
    explain_kind,
    explain_sizes,
    factors_pay,
    flatten_shape,
    widen,
)
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["HRA", "METHOD", "read_hra"]


@dataclass(frozen=True)
class HRA:
    """`columns` `[in, r]`. `orthogonal`: they are made orthogonal first, as Gram and Schmidt do it."""

    columns: Array
    orthogonal: bool

    @property
    def method(self) -> str:
        return "HRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding):
            return explain_kind("HRA", "linear modules and convolutions", shape, kind)
        return explain_sizes("HRA", (shape[0] if shape else 0, len(self.columns)), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors(weight)
        return widen(weight) + (b @ a).reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """A reflection takes away twice the part of the weight along its column, which is of rank 1."""
        return MatrixDelta(*self._factors(weight)) if factors_pay(self.columns.shape[1], weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self, weight: Array) -> tuple[Floats, Floats]:
        """`[r, in]`, the directions, and `[out, r]`, what each reflection adds along its own."""
        directions = self._directions()
        reflected = widen(weight).reshape(flatten_shape(weight.shape)).copy()
        added = np.empty((len(reflected), directions.shape[1]), reflected.dtype)
        for index, direction in enumerate(directions.T):
            added[:, index] = -2 * (reflected @ direction)
            reflected += added[:, index, None] * direction
        return directions.T, added

    def _directions(self) -> Floats:
        """The columns with norm 1."""
        columns = widen(self.columns).copy()
        for index in range(columns.shape[1]):
            column = columns[:, index]  # a view: what changes here changes there
            if self.orthogonal:
                for earlier in columns[:, :index].T:
                    column -= (earlier @ column) * earlier
            column /= np.linalg.norm(column)
        return columns


def read_hra(module: Module) -> Contribution:
    """`hra_u` `[in, r]`, of a convolution `[channels · kernel, r]`.

    Raises TensorError: it is missing, not of the config's `r`, or a column of it is zero.
    """
    columns = module.tensor("hra_u", 2)
    has_rank = columns.shape[1] == module.rank and columns.size > 0
    module.must(has_rank, f"HRA must have the config's r, {module.rank} columns")
    module.must(bool(columns.any(axis=0).all()), "a column of zeros has no direction to reflect along")
    return Contribution(change=HRA(columns, bool(module.fields.get("apply_GS"))))


METHOD = Method(
    peft_type="HRA",
    name="HRA",
    read=read_hra,
    docs=(DocsRow("`HRA`", "delta: r reflections change a weight by a rank of r"),),
    tensors=bare_parameters("hra_u"),
    fields=frozenset({"apply_GS", "r"}),
    rank="r",
)
