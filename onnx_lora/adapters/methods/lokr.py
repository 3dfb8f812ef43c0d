"""LoKr: a Kronecker product is added.

LyCORIS (Yeh et al. 2023), section 3: `W = W0 + alpha / r · W1 ⊗ W2`, each of the two whole or a product of low rank.
The reference is PEFT 0.21: `lokr/layer.py`, `get_delta_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.products import LYCORIS_FIELDS, CoredProduct, Product, Whole, read_product
from onnx_lora.adapters.methods.weights import explain_kind, explain_sizes, factors_pay, widen
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["METHOD", "LoKr", "read_lokr"]


@dataclass(frozen=True)
class LoKr:
    """`first` `[a, c]` and `second` `[b, d, *kernel]`, of a weight `[a · b, c · d, *kernel]`."""

    first: Whole | Product | CoredProduct
    second: Whole | Product | CoredProduct
    scale: float

    @property
    def method(self) -> str:
        return "LoKr"

    @property
    def _conv1d(self) -> Array | None:
        """W2 where it is whole and has a kernel of one axis. PEFT's product then adds an axis to W1 in front, not
        behind, and so is no Kronecker product of the weight as a matrix."""
        if isinstance(self.second, Whole) and self.second.values.ndim == 3:
            return self.second.values
        return None

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding):
            return explain_kind("LoKr", "linear modules and convolutions", shape, kind)
        conv1d = self._conv1d
        if conv1d is not None and shape[2:] != conv1d.shape[2:]:
            return f"LoKr must meet a kernel of shape {conv1d.shape[2:]}, and this weight has shape {shape}"
        outputs = self.first.outputs * self.second.outputs
        inputs = self.first.inputs * self.second.inputs
        return explain_sizes("LoKr", (outputs, inputs), shape)

    def apply_to(self, weight: Array) -> Array:
        conv1d = self._conv1d
        second = self.second.matrix() if conv1d is None else widen(conv1d)
        product = np.kron(self.first.matrix(), second)
        return widen(weight) + product.reshape(weight.shape) * np.float32(self.scale)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """(L1 · R1) ⊗ (L2 · R2) = (L1 ⊗ L2) · (R1 ⊗ R2)."""
        if self._conv1d is not None:
            return None
        first = _choose_smaller(self.first)
        second = _choose_smaller(self.second)
        if not factors_pay(first.rank * second.rank, weight.shape):
            return None
        left1, right1 = first.factors()
        left2, right2 = second.factors()
        a = np.kron(right1, right2)
        b = np.kron(left1, left2) * np.float32(self.scale)
        return MatrixDelta(a, b)

    def output_scale(self) -> Array | None:
        return None


def _choose_smaller(operand: Whole | Product | CoredProduct) -> Whole | Product | CoredProduct:
    """The operand or, where that has a smaller rank, the array that it makes. Neither needs a decomposition."""
    if operand.rank <= min(operand.outputs, operand.inputs):
        return operand
    return Whole(operand.matrix())


def read_lokr(module: Module) -> Contribution:
    """`lokr_w1` `[a, c]`, or its factors `lokr_w1_a` `[a, r]` and `lokr_w1_b` `[r, c]`; `lokr_w2` `[b, d, *kernel]`, or
    `lokr_w2_a` `[b, r]` and `lokr_w2_b` `[r, d · kernel]`; with the core `lokr_t2` `[r, r, *kernel]` those are `[r, b]`
    and `[r, d]`.

    Raises TensorError: one of them is missing or there twice, the ranks are not the config's, or the shapes do not fit.
    """
    first = _read_whole(module, "lokr_w1", axes=(2,)) or read_product(module, "lokr_w1")
    second = _read_whole(module, "lokr_w2", axes=(2, 3, 4)) or read_product(module, "lokr_w2", "lokr_t2")
    return Contribution(change=LoKr(first, second, module.scale))


def _read_whole(module: Module, name: str, axes: tuple[int, ...]) -> Whole | None:
    """One array; None where there are factors in its place. Raises TensorError: another number of axes, or both."""
    if not module.has(name):
        return None
    values = module.tensor(name)
    numbers = " or ".join(str(number) for number in axes)
    module.must(values.ndim in axes and values.size > 0, f"{name} must have {numbers} axes")
    core = name.replace("_w", "_t")
    has_factors = any(module.has(factor) for factor in (f"{name}_a", f"{name}_b", core))
    module.must(not has_factors, f"{name} must be whole, or made of factors")
    return Whole(values)


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
