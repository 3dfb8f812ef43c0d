"""LoKr: a Kronecker product. LyCORIS (Yeh et al. 2023), section 3; PEFT's `LoKrLayer.get_delta_weight`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, columns, kernel_unlike, not_for, pair, pays, rows, thin, wide
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["LoKr"]


@dataclass(frozen=True)
class LoKr:
    """`W = W0 + scale · W1 ⊗ W2`; each is one array, or a pair whose product it is, or by modes (`thin`).

    `first` is `[a, c]`, `second` `[b, d]` or with a kernel behind, and the weight `[a · b, c · d, *kernel]`.
    """

    first: tuple[Array, ...]
    second: tuple[Array, ...]
    scale: float

    @property
    def method(self) -> str:
        return "LoKr"

    @property
    def _sizes(self) -> tuple[int, int]:
        """Outputs and inputs of the weight, its kernel counted as inputs."""
        return rows(self.first) * rows(self.second), columns(self.first) * columns(self.second)

    @property
    def _is_conv1d(self) -> bool:
        """A whole W2 with a kernel of one axis. PEFT's product pads W1 in front of it, not behind, and so it is no
        Kronecker product of the weight's own axes."""
        return len(self.second) == 1 and self.second[0].ndim == 3

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding):
            return not_for("LoKr", "linear modules and convolutions", shape, kind)
        if self._is_conv1d and shape[2:] != self.second[0].shape[2:]:
            return f"LoKr must meet a kernel of shape {self.second[0].shape[2:]}, and this weight has shape {shape}"
        return kernel_unlike("LoKr", self._sizes, shape)

    def apply_to(self, weight: Array) -> Array:
        if self._is_conv1d:
            product = np.kron(_product(self.first), wide(self.second[0]))
        else:
            product = np.kron(_product(self.first), _product(self.second))
        return wide(weight) + product.reshape(weight.shape) * np.float32(self.scale)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """(L1 · R1) ⊗ (L2 · R2) = (L1 ⊗ L2) · (R1 ⊗ R2)."""
        if self._is_conv1d:
            return None
        rank = _rank(self.first) * _rank(self.second)
        if not pays(rank, weight.shape):
            return None
        (left1, right1), (left2, right2) = _smallest(self.first), _smallest(self.second)
        return pair(np.kron(right1, right2), np.kron(left1, left2) * np.float32(self.scale))

    def output_scale(self) -> Array | None:
        return None


def _product(parts: tuple[Array, ...]) -> Floats:
    """As one matrix, the axes of a kernel side by side."""
    if len(parts) == 1:
        return wide(parts[0]).reshape(len(parts[0]), -1)
    left, right = thin(parts)
    return left @ right


def _rank(parts: tuple[Array, ...]) -> int:
    """The most that `_smallest` needs."""
    return min(rows(parts), columns(parts), *(len(factor) for factor in parts[1:][-1:]))


def _smallest(parts: tuple[Array, ...]) -> tuple[Floats, Floats]:
    """As a pair of the smallest rank that needs no decomposition."""
    rank = _rank(parts)
    if len(parts) > 1 and len(parts[-1]) == rank:
        return thin(parts)
    matrix = _product(parts)
    identity = np.eye(rank, dtype=matrix.dtype)
    return (identity, matrix) if len(matrix) == rank else (matrix, identity)
