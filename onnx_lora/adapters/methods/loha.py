"""LoHa: the elementwise product of two products of low rank is added.

LoHa is FedPara (Hyeon-Woo et al. 2022), proposition 1: `W = W0 + alpha / r · (B1 · A1) ∘ (B2 · A2)`; of a kernel with
`use_effective_conv2d` each product is a core times two factors, proposition 3. The reference is PEFT 0.21:
`loha/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.products import LYCORIS_FIELDS, CoredProduct, Product, read_product
from onnx_lora.adapters.methods.weights import Floats, explain_kind, explain_sizes, factors_pay, widen
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["METHOD", "LoHa", "read_loha"]


@dataclass(frozen=True)
class LoHa:
    """`left` and `right`, of one shape, are the products that are multiplied element by element."""

    left: Product | CoredProduct
    right: Product | CoredProduct
    scale: float

    @property
    def method(self) -> str:
        return "LoHa"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding):
            return explain_kind("LoHa", "linear modules and convolutions", shape, kind)
        return explain_sizes("LoHa", (self.left.outputs, self.left.inputs), shape)

    def apply_to(self, weight: Array) -> Array:
        change: Floats = self.left.matrix() * self.right.matrix() * np.float32(self.scale)
        return widen(weight) + change.reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """Of the product of both ranks: every column of one with every column of the other."""
        rank = self.left.rank * self.right.rank
        if not factors_pay(rank, weight.shape):
            return None
        b1, a1 = self.left.factors()
        b2, a2 = self.right.factors()
        a = (a1[:, None] * a2[None]).reshape(rank, -1)
        b = (b1[:, :, None] * b2[:, None]).reshape(-1, rank)
        return MatrixDelta(a, b * np.float32(self.scale))

    def output_scale(self) -> Array | None:
        return None


def read_loha(module: Module) -> Contribution:
    """`hada_w1_a` and `hada_w2_a` `[out, r]`, `hada_w1_b` and `hada_w2_b` `[r, in · kernel]`; with the cores `hada_t1`
    and `hada_t2` `[r, r, *kernel]` they are `[r, out]` and `[r, in]`.

    Raises TensorError: one of them is missing, the ranks are not the config's, or the shapes do not fit.
    """
    left = read_product(module, "hada_w1", "hada_t1")
    right = read_product(module, "hada_w2", "hada_t2")
    module.must(module.has("hada_t1") == module.has("hada_t2"), "LoHa must have hada_t1 and hada_t2, or none of them")
    same_shape = left.outputs == right.outputs and left.inputs == right.inputs
    module.must(same_shape, "the two products of LoHa must have one shape")
    return Contribution(change=LoHa(left, right, module.scale))


METHOD = Method(
    peft_type="LOHA",
    name="LoHa",
    read=read_loha,
    docs=(DocsRow("`LOHA`", "delta, with `use_effective_conv2d` too"),),
    tensors=bare_parameters("hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    fields=LYCORIS_FIELDS,
    rank="r",
    alpha="alpha",
    patterns=True,
)
