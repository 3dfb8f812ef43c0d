"""LoKr: a Kronecker product is added.

LyCORIS (Yeh et al. 2023), section 3: `W = W0 + alpha / r · W1 ⊗ W2`, each of the two whole or a product of low rank.
The reference is PEFT 0.21: `lokr/layer.py`, `get_delta_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import Floats, wide
from onnx_lora.adapters.methods.method import DocsRow, Method, Module, Part, bare_parameters
from onnx_lora.adapters.methods.products import LYCORIS_FIELDS, columns, read_product, rows, thin
from onnx_lora.adapters.methods.shapes import kernel_unlike, not_for, pair, pays
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["METHOD", "LoKr", "read_lokr"]


@dataclass(frozen=True)
class LoKr:
    """`first` `[a, c]` and `second` `[b, d, *kernel]`, of a weight `[a · b, c · d, *kernel]`. Each is one array, or a
    pair whose product it is, or by modes (`products.thin`)."""

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


def read_lokr(module: Module) -> Part:
    """`lokr_w1` `[a, c]`, or its factors `lokr_w1_a` `[a, r]` and `lokr_w1_b` `[r, c]`; `lokr_w2` `[b, d, *kernel]`, or
    `lokr_w2_a` `[b, r]` and `lokr_w2_b` `[r, d · kernel]`; with the core `lokr_t2` `[r, r, *kernel]` those are `[r, b]`
    and `[r, d]`.

    Raises TensorError: one of them is missing or there twice, the ranks are not the config's, or the shapes do not fit.
    """
    first = _read_whole(module, "lokr_w1", axes=(2,)) or read_product(module, "lokr_w1")
    second = _read_whole(module, "lokr_w2", axes=(2, 3, 4)) or read_product(module, "lokr_w2", "lokr_t2")
    return Part(change=LoKr(first, second, module.scale))


def _read_whole(module: Module, name: str, axes: tuple[int, ...]) -> tuple[Array] | None:
    """One array; None where there are factors in its place. Raises TensorError: another number of axes, or both."""
    if not module.has(name):
        return None
    whole = module.tensor(name)
    module.must(whole.ndim in axes and whole.size > 0, f"{name} must have {' or '.join(map(str, axes))} axes")
    factors = {f"{name}_a", f"{name}_b", name.replace("_w", "_t")} & set(module.tensors)
    module.must(not factors, f"{name} must be whole, or made of factors")
    return (whole,)


METHOD = Method(
    peft_type="LOKR",
    name="LoKr",
    read=read_lokr,
    docs=(DocsRow("`LOKR`", "delta, with `use_effective_conv2d` too; a Conv1d's whole `lokr_w2` folds"),),
    tensors=bare_parameters("lokr_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    fields=LYCORIS_FIELDS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    rank="r",
    alpha="alpha",
    patterns=True,
)
