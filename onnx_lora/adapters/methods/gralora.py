"""GraLoRA: each block of the weight has a pair of factors of its own.

GraLoRA (Jung et al. 2025), section 3.2: the weight is k · k blocks, and block (j, i) gets
`alpha / (r + hybrid_r) · B_ji · A_ij` of rank r / k. With `hybrid_r` a pair for the whole weight is added.
The reference is PEFT 0.21: `gralora/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import Floats, explain_kind, explain_sizes, factors_pay, widen
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "GraLoRA", "read_gralora"]


@dataclass(frozen=True)
class GraLoRA:
    """`a` `[n, in / n, r]`, `b` `[n, r, out / n]`: block (j, i) of the weight, `[out / n, in / n]`, is made of r / n
    columns of a[i] and of b[j]. `general`: a pair `[h, in]`, `[out, h]` for the whole weight."""

    a: Array
    b: Array
    general: tuple[Array, Array] | None
    scale: float

    @property
    def method(self) -> str:
        return "GraLoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear):
            return explain_kind("GraLoRA", "linear modules", shape, kind)
        outputs = len(self.b) * self.b.shape[2]
        inputs = len(self.a) * self.a.shape[1]
        return explain_sizes("GraLoRA", (outputs, inputs), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._blocks()
        product: Floats = np.einsum("nijt,jnto->joni", a, b, optimize=True)
        change = product.reshape(weight.shape)
        if self.general is not None:
            general_a, general_b = self.general
            change = change + widen(general_b) @ widen(general_a)
        return widen(weight) + change * np.float32(self.scale)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """One column for each input block, output block and rank of theirs."""
        n, _, rank = self.a.shape
        outputs, inputs = weight.shape
        general_rank = 0 if self.general is None else len(self.general[0])
        if not factors_pay(n * rank + general_rank, weight.shape):
            return None
        blocks_a, blocks_b = self._blocks()
        identity = np.eye(n, dtype=blocks_a.dtype)
        a = np.einsum("nijt,nm->njtmi", blocks_a, identity).reshape(n * rank, inputs)
        b = np.einsum("jnto,jk->konjt", blocks_b, identity).reshape(outputs, n * rank)
        if self.general is not None:
            general_a, general_b = self.general
            a = np.concatenate([a, widen(general_a)])
            b = np.concatenate([b, widen(general_b)], axis=1)
        return MatrixDelta(a, b * np.float32(self.scale))

    def output_scale(self) -> Array | None:
        return None

    def _blocks(self) -> tuple[Floats, Floats]:
        """A `[n, in / n, n, r / n]` by input block, input and output block; B `[n, n, r / n, out / n]` by output block
        and input block."""
        n, inputs, rank = self.a.shape
        rank_of_block = rank // n
        a = widen(self.a).reshape(n, inputs, n, rank_of_block)
        b = widen(self.b).reshape(n, n, rank_of_block, -1)
        return a, b


def read_gralora(module: Module) -> Contribution:
    """`gralora_A` `[k, in / k, r]` and `gralora_B` `[k, r, out / k]`; with `hybrid_r` h a pair `gralora_A_general`
    `[h, in]` and `gralora_B_general` `[out, h]`.

    Raises TensorError: one of them is missing, or they are not of the config's `gralora_k`, `r` and `hybrid_r`.
    """
    a = module.tensor("gralora_A", 3)
    b = module.tensor("gralora_B", 3)
    blocks = module.count("gralora_k")
    rank = module.rank
    hybrid = module.count("hybrid_r", least=0)
    has_blocks = len(a) == len(b) == blocks
    has_rank = a.shape[2] == b.shape[1] == rank and rank % blocks == 0
    module.must(has_blocks and has_rank, f"GraLoRA must have {blocks} blocks of rank {rank}, a multiple of that")
    general: tuple[Array, Array] | None = None
    if hybrid:
        general_a = module.tensor("gralora_A_general", 2)
        general_b = module.tensor("gralora_B_general", 2)
        fits_inputs = general_a.shape == (hybrid, blocks * a.shape[1])
        fits_outputs = general_b.shape == (blocks * b.shape[2], hybrid)
        module.must(fits_inputs and fits_outputs, f"GraLoRA must have a general pair of rank {hybrid}")
        general = general_a, general_b
    return Contribution(change=GraLoRA(a, b, general, lora_scale(module.alpha, rank + hybrid)))


METHOD = Method(
    peft_type="GRALORA",
    name="GraLoRA",
    read=read_gralora,
    docs=(DocsRow("`GRALORA`", "delta"),),
    tensors=bare_parameters("gralora_A", "gralora_B")
    | dict.fromkeys(("gralora_A_general", "gralora_B_general"), ("weight",)),
    fields=frozenset({"alpha", "gralora_dropout", "gralora_k", "hybrid_r", "r"}),
    rank="r",
    alpha="alpha",
)
