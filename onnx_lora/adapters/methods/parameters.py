"""LoRA on a bare parameter: a matrix, or one for every expert.

`W = W0 + scale · B · A`, of each expert apart. The reference is PEFT 0.21: `lora/layer.py`, `ParamWrapper`. Which pairs
of a file are of bare parameters, `formats/peft/parameters.py` knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import Floats, wide
from onnx_lora.adapters.methods.method import DocsRow
from onnx_lora.adapters.methods.shapes import pair, pays
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["DOCS", "ParameterLora"]

DOCS = DocsRow(
    "`target_parameters`",
    "delta of a matrix; of one for each expert a whole weight, where the package can replace it "
    "(`--replaceable experts.gate_up_proj`); refused where a side's equal length leaves open which axis is the outputs",
)


@dataclass(frozen=True)
class ParameterLora:
    """`pairs`: those of the parameter's module, of which it takes the one that fits its shape; a file says no more.

    Of a parameter `[out, in]`, or stored as `[in, out]`: A `[r, in]`, B `[out, r]`. Of one `[experts, x, y]`: A
    `[experts · r, y]` and B `[x, r · experts]`, or the other way round. Where x and y are equal nothing tells which.
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
            by_expert = a.reshape(experts, self.rank, -1), b.reshape(len(b), self.rank, experts)
            product = np.einsum("ore,eri->eoi", by_expert[1], by_expert[0], optimize=True)
        if product.shape != weight.shape:
            product = product.swapaxes(-1, -2)
        return wide(weight) + product * np.float32(self.scale)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        if weight.ndim != 2 or not pays(self.rank, weight.shape):
            return None
        a, b = self._fitting(weight.shape)[0]
        factors = (a, b) if len(b) == weight.shape[0] else (b.T, a.T)
        return pair(factors[0], factors[1] * np.float32(self.scale))

    def output_scale(self) -> Array | None:
        return None

    def _fitting(self, shape: tuple[int, ...]) -> list[tuple[Floats, Floats]]:
        experts = shape[0] if len(shape) == 3 else 1
        return [
            (wide(a), wide(b))
            for a, b in self.pairs
            if len(a) == self.rank * experts == b.shape[1] and {a.shape[1], len(b)} == set(shape[-2:])
        ]
