"""LoRA on a bare parameter: a matrix, or one for every expert.

`W = W0 + scale · B · A`, of each expert apart. The reference is PEFT 0.21: `lora/layer.py`, `ParamWrapper`. Which pairs
of a file are of bare parameters, `formats/peft/parameters.py` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import DocsRow
from onnx_lora.adapters.methods.weights import Floats, factors_pay, widen
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["DOCS", "ParameterLora"]

DOCS = DocsRow(
    "`target_parameters`",
    "delta of a matrix; of one for each expert a whole weight, where `replaceable` names it (`experts.gate_up_proj`); "
    "refused where a side's equal length leaves open which axis is the outputs",
)


@dataclass(frozen=True)
class ParameterLora:
    """`pairs`: all pairs of the parameter's module. Only the shapes tell which of them is the parameter's.

    A parameter `[out, in]`, which may be stored as `[in, out]`, has A `[r, in]` and B `[out, r]`. One `[experts, x, y]`
    has A `[experts · r, y]` and B `[x, r · experts]`, or A with x and B with y. Where x and y are equal, nothing in the
    file tells which axis is the outputs.
    """

    pairs: Sequence[tuple[Array, Array]]
    rank: int
    scale: float

    @property
    def method(self) -> str:
        return "LoRA on a parameter"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) not in (2, 3):
            return f"LoRA on a parameter must meet a matrix or one for each expert, not a {kind} of shape {shape}"
        found = len(self._fitting(shape))
        if found == 1 and shape[-1] != shape[-2]:
            return None
        sizes = ", ".join(f"A {a.shape} and B {b.shape}" for a, b in self.pairs)
        if found:
            return (
                f"LoRA on a parameter of shape {shape}: with {sizes} and rank {self.rank} nothing in the file tells "
                "which axis is the outputs; train it with target_modules, or merge it with PEFT"
            )
        return f"LoRA on a parameter must have factors that fit its shape {shape} at rank {self.rank}, and has {sizes}"

    def apply_to(self, weight: Array) -> Array:
        a, b = self._fitting(weight.shape)[0]
        if weight.ndim == 2:
            product = b @ a
        else:
            experts = weight.shape[0]
            expert_a = a.reshape(experts, self.rank, -1)
            expert_b = b.reshape(len(b), self.rank, experts)
            product = np.einsum("ore,eri->eoi", expert_b, expert_a, optimize=True)
        if product.shape != weight.shape:
            product = product.swapaxes(-1, -2)
        return widen(weight) + product * np.float32(self.scale)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        if weight.ndim != 2 or not factors_pay(self.rank, weight.shape):
            return None
        a, b = self._fitting(weight.shape)[0]
        if len(b) != weight.shape[0]:  # the parameter is stored as [in, out]
            a, b = b.T, a.T
        return MatrixDelta(a, b * np.float32(self.scale))

    def output_scale(self) -> Array | None:
        return None

    def _fitting(self, shape: tuple[int, ...]) -> list[tuple[Floats, Floats]]:
        """The pairs that fit a parameter of this shape, in either order of its axes."""
        experts = shape[0] if len(shape) == 3 else 1
        sizes = set(shape[-2:])
        fitting: list[tuple[Floats, Floats]] = []
        for a, b in self.pairs:
            has_rank = len(a) == self.rank * experts == b.shape[1]
            if has_rank and {a.shape[1], len(b)} == sizes:
                fitting.append((widen(a), widen(b)))
        return fitting
