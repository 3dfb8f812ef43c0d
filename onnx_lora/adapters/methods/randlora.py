"""RandLoRA: a sum of products of random matrices of low rank, together of full rank, is added.

RandLoRA (Albert et al. 2025), equation 4: `W = W0 + alpha / r · Σ B_i · Λ_i · A · Γ_i`, with random B_i and A for all
modules, and diagonals Λ_i and Γ_i for each. The reference is PEFT 0.21: `randlora/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import explain_kind, widen
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "RandLoRA", "read_randlora"]


@dataclass(frozen=True)
class RandLoRA:
    """The shared `a` `[r, 1, small]` and `b` `[large, bases, r]`, as much of them as the module is wide on its smaller
    and its larger side; its own `by_rank` `[r, bases]` and `by_small` `[bases, small]`."""

    a: Array
    b: Array
    by_rank: Array
    by_small: Array
    scale: float

    @property
    def method(self) -> str:
        return "RandLoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return explain_kind("RandLoRA", "linear modules", shape, kind)
        small, bases = min(shape), self.by_rank.shape[1]
        if self.by_small.shape != (bases, small) or small > self.a.shape[2]:
            wanted = self.by_small.shape[1]
            return f"RandLoRA must meet a weight of {wanted} on its smaller side, and this one has shape {shape}"
        if max(shape) > len(self.b) or bases > self.b.shape[1]:
            return (
                f"RandLoRA's bases reach {self.b.shape[:2]}, and a weight of shape {shape} needs {(max(shape), bases)}"
            )
        return None

    def apply_to(self, weight: Array) -> Array:
        small, large, bases = min(weight.shape), max(weight.shape), self.by_rank.shape[1]
        own = widen(self.by_rank)[:, :, None] * widen(self.a[:, :, :small]) * widen(self.by_small)
        shared = widen(self.b[:large, :bases])
        # The one by rank and base, the other by base and rank, as PEFT multiplies them.
        product = shared.reshape(large, -1) @ own.reshape(-1, small) * widen(self.a).dtype.type(self.scale)
        return widen(weight) + (product if small == weight.shape[1] else product.T)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """Its rank is the weight's own."""
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def read_randlora(module: Module) -> Contribution:
    """The shared `randlora_A` `[r, 1, small]` and `randlora_B` `[large, bases, r]`, which PEFT writes once more for
    every module; the module's own `randlora_lambda` `[r, bases]` and `randlora_gamma` `[bases, small]`.

    Raises TensorError: one of them is missing or not of the config's `r`, or a module's copy is another than the
    shared matrix.
    """
    a, b = _read_shared(module, "randlora_A"), _read_shared(module, "randlora_B")
    by_rank, by_small = module.tensor("randlora_lambda", 2), module.tensor("randlora_gamma", 2)
    rank, bases = by_rank.shape
    has_rank = rank == module.rank == len(a) == b.shape[2]
    module.must(
        has_rank and a.shape[1] == 1 and len(by_small) == bases,
        f"RandLoRA's bases {a.shape}, {b.shape} must be of its rank {module.rank}",
    )
    return Contribution(change=RandLoRA(a, b, by_rank, by_small, module.scale))


def _read_shared(module: Module, name: str) -> Array:
    copy, shared = module.tensor(name, 3), module.shared[name]
    module.must(copy is shared or np.array_equal(copy, shared), f"{name} must be the same for all modules")
    return shared


METHOD = Method(
    peft_type="RANDLORA",
    name="RandLoRA",
    read=read_randlora,
    docs=(DocsRow("`RANDLORA`", "fold; refused without the projections (`save_projection=False`)"),),
    tensors=bare_parameters("randlora_A", "randlora_B", "randlora_gamma", "randlora_lambda"),
    shared=("randlora_A", "randlora_B"),
    fields=frozenset(
        {
            "d_initial",
            "projection_prng_key",
            "r",
            "randlora_alpha",
            "randlora_dropout",
            "save_projection",
            "sparse",
            "very_sparse",
        }
    ),
    rank="r",
    alpha="randlora_alpha",
)
