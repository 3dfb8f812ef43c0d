"""QA-LoRA: LoRA whose A reads the means of groups of inputs.

QA-LoRA (Xu et al. 2024), section 3.3: the inputs are pooled in groups of L before A, so that the change of a quantized
weight is constant in each group. The reference is PEFT 0.21: `lora/variants.py`, `QALoraLinearVariant`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import DocsRow, Module
from onnx_lora.adapters.methods.weights import Floats, explain_kind, explain_sizes, factors_pay, widen
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["DOCS", "QALoRA", "read_qalora"]


@dataclass(frozen=True)
class QALoRA:
    """`a` `[r, in / group]`, `b` `[out, r]`. PEFT pools the inputs of GPTQ's modules only. Other modules get plain LoRA
    from it, `a` `[r, in]`; only the shape of the weight tells which of the two a file holds."""

    a: Array
    b: Array
    scale: float
    group: int

    @property
    def method(self) -> str:
        return "QA-LoRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear):
            return explain_kind("QA-LoRA", "linear modules", shape, kind)
        plain = explain_sizes("QA-LoRA", (len(self.b), self.a.shape[1]), shape)
        pooled = explain_sizes("QA-LoRA", (len(self.b), self.a.shape[1] * self.group), shape)
        if self.group == 1 and plain is None:
            return f"QA-LoRA in groups of 1 on a weight of shape {shape}: the file does not tell it from plain LoRA"
        return pooled if plain is not None else None

    def apply_to(self, weight: Array) -> Array:
        a, b = self._factors(weight.shape)
        return widen(weight) + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        return MatrixDelta(*self._factors(weight.shape)) if factors_pay(len(self.a), weight.shape) else None

    def output_scale(self) -> Array | None:
        return None

    def _factors(self, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
        """The mean of each group, times the number of groups."""
        a = widen(self.a)
        b = widen(self.b) * np.float32(self.scale)
        pooled = a.shape[1]
        if pooled != shape[1]:
            a = np.repeat(a, self.group, axis=1) * a.dtype.type(pooled / self.group)
        return a, b


def read_qalora(module: Module, a: Array, b: Array) -> QALoRA:
    """`lora_A` `[r, in / qalora_group_size]`, or `[r, in]`, and `lora_B` `[out, r]`.

    Raises TensorError: the config gives no size of groups, or says use_dora too.
    """
    module.must(not module.fields.get("use_dora"), "use_qalora does not go with use_dora")
    return QALoRA(a, b, module.scale, module.count("qalora_group_size"))


DOCS = DocsRow(
    "`use_qalora` (QA-LoRA)",
    "delta; the weight's shape tells PEFT's pooled A from a plain one, and a group size of 1 is refused",
)
