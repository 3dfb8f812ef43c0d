"""HRA: the inputs reflected, one Householder reflection a column. HRA (Yuan et al. 2024), section 3.1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, flat, kernel_unlike, not_for, pair, pays, wide
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["HRA"]


@dataclass(frozen=True)
class HRA:
    """`W = W0 · H1 · … · Hr`, with `H = I - 2uuᵀ / uᵀu` for each of the columns `[in, r]`.

    `orthogonal`: the columns are made so first, by Gram and Schmidt.
    """

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
