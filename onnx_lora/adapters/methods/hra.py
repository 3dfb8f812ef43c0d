"""HRA: the inputs of a weight are reflected, once for each trained column.

HRA (Yuan et al. 2024), section 3.1: `W = W0 · H1 · … · Hr`, with the Householder reflections `H = I - 2uuᵀ / uᵀu`; with
`apply_GS` the columns u are made orthogonal first. The reference is PEFT 0.21: `hra/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import Floats, flat, wide
from onnx_lora.adapters.methods.method import DocsRow, Method, Module, Part, bare_parameters
from onnx_lora.adapters.methods.shapes import kernel_unlike, not_for, pair, pays
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["HRA", "METHOD", "read_hra"]


@dataclass(frozen=True)
class HRA:
    """`columns` `[in, r]`. `orthogonal`: they are made so first, as Gram and Schmidt do it."""

    columns: Array
    orthogonal: bool

    @property
    def method(self) -> str:
        return "HRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding):
            return not_for("HRA", "linear modules and convolutions", shape, kind)
        return kernel_unlike("HRA", (shape[0] if shape else 0, len(self.columns)), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors(weight)
        return wide(weight) + (b @ a).reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """Each reflection takes twice the part along its column away: r of them are of rank r."""
        return pair(*self._factors(weight)) if pays(self.columns.shape[1], weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self, weight: Array) -> tuple[Floats, Floats]:
        directions = self._directions()
        left = wide(weight).reshape(flat(weight.shape)).copy()
        taken = np.empty((len(left), directions.shape[1]), left.dtype)
        for index, column in enumerate(directions.T):
            taken[:, index] = -2 * (left @ column)
            left += taken[:, index, None] * column
        return directions.T, taken

    def _directions(self) -> Floats:
        """The columns with norm 1."""
        columns = wide(self.columns).copy()
        for index in range(columns.shape[1]):
            if self.orthogonal:
                for earlier in columns[:, :index].T:
                    columns[:, index] -= (earlier @ columns[:, index]) * earlier
            columns[:, index] /= np.linalg.norm(columns[:, index])
        return columns


def read_hra(module: Module) -> Part:
    """`hra_u` `[in, r]`, of a convolution `[channels · kernel, r]`.

    Raises TensorError: it is missing, not of the config's `r`, or a column of it is zero.
    """
    columns = module.tensor("hra_u", 2)
    has_rank = columns.shape[1] == module.rank and columns.size > 0
    module.must(has_rank, f"HRA must have the config's r, {module.rank} columns")
    module.must(bool(columns.any(axis=0).all()), "a column of zeros has no direction to reflect along")
    return Part(change=HRA(columns, bool(module.fields.get("apply_GS"))))


METHOD = Method(
    peft_type="HRA",
    name="HRA",
    read=read_hra,
    docs=(DocsRow("`HRA`", "delta: r reflections change a weight by a rank of r"),),
    tensors=bare_parameters("hra_u"),
    fields=frozenset({"apply_GS", "r"}),
    rank="r",
)
