"""GraLoRA: each block of the weight has a pair of factors of its own.

GraLoRA (Jung et al. 2025), section 3.2: the weight is k · k blocks, and block (j, i) gets
`alpha / (r + hybrid_r) · B_ji · A_ij` of rank r / k. With `hybrid_r` a pair for the whole weight is added.
The reference is PEFT 0.21: `gralora/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import Floats, wide
from onnx_lora.adapters.methods.method import DocsRow, Method, Module, Part, bare_parameters
from onnx_lora.adapters.methods.shapes import kernel_unlike, not_for, pair, pays
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
            return not_for("GraLoRA", "linear modules", shape, kind)
        return kernel_unlike("GraLoRA", (len(self.b) * self.b.shape[2], len(self.a) * self.a.shape[1]), shape)

    def apply_to(self, weight: Array) -> Array:
        a, b = self._blocks()
        product: Floats = np.einsum("nijt,jnto->joni", a, b, optimize=True)
        change = product.reshape(weight.shape)
        if self.general:
            change = change + wide(self.general[1]) @ wide(self.general[0])
        return wide(weight) + change * np.float32(self.scale)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """One column for each input block, output block and rank of theirs."""
        n, part = len(self.a), self.a.shape[2]
        hybrid = len(self.general[0]) if self.general else 0
        if not pays(n * part + hybrid, weight.shape):
            return None
        blocks_a, blocks_b = self._blocks()
        each = np.eye(n, dtype=blocks_a.dtype)
        a = np.einsum("nijt,nm->njtmi", blocks_a, each).reshape(n * part, weight.shape[1])
        b = np.einsum("jnto,jk->konjt", blocks_b, each).reshape(weight.shape[0], n * part)
        if self.general:
            a, b = np.concatenate([a, wide(self.general[0])]), np.concatenate([b, wide(self.general[1])], axis=1)
        return pair(a, b * np.float32(self.scale))

    def output_scale(self) -> Array | None:
        return None

    def _blocks(self) -> tuple[Floats, Floats]:
        """`[n, in / n, n, r / n]` by input block, input, output block; `[n, n, r / n, out / n]` by output and input
        block."""
        n, inputs, rank = self.a.shape
        a = wide(self.a).reshape(n, inputs, n, rank // n)
        return a, wide(self.b).reshape(n, n, rank // n, -1)


def read_gralora(module: Module) -> Part:
    """`gralora_A` `[k, in / k, r]` and `gralora_B` `[k, r, out / k]`; with `hybrid_r` h a pair `gralora_A_general`
    `[h, in]` and `gralora_B_general` `[out, h]`.

    Raises TensorError: one of them is missing, or they are not of the config's `gralora_k`, `r` and `hybrid_r`.
    """
    a, b, blocks = module.tensor("gralora_A", 3), module.tensor("gralora_B", 3), module.count("gralora_k")
    rank, hybrid = module.rank, module.count("hybrid_r", least=0)
    has_blocks = len(a) == len(b) == blocks
    has_rank = a.shape[2] == b.shape[1] == rank and rank % blocks == 0
    module.must(has_blocks and has_rank, f"GraLoRA must have {blocks} blocks of rank {rank}, a multiple of that")
    general: tuple[Array, Array] | None = None
    if hybrid:
        general = module.tensor("gralora_A_general", 2), module.tensor("gralora_B_general", 2)
        fits_inputs = general[0].shape == (hybrid, blocks * a.shape[1])
        fits_outputs = general[1].shape == (blocks * b.shape[2], hybrid)
        module.must(fits_inputs and fits_outputs, f"GraLoRA must have a general pair of rank {hybrid}")
    return Part(change=GraLoRA(a, b, general, lora_scale(module.alpha, rank + hybrid)))


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
