"""C3A: a matrix of circular convolutions is added.

C3A (Chen et al. 2025), section 3: the change is `[out / b, in / b]` blocks, each a circulant matrix of b numbers, all
divided by the number of inputs. The reference is PEFT 0.21: `c3a/utils.py`, `BlockCircularConvolution`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import Floats, explain_kind, explain_sizes, widen
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["C3A", "METHOD", "read_c3a"]


@dataclass(frozen=True)
class C3A:
    """`kernels` `[out / b, in / b, b]`: output k of a block takes input t with the kernel's number `(t - k) mod b`."""

    kernels: Array

    @property
    def method(self) -> str:
        return "C3A"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear):
            return explain_kind("C3A", "linear modules", shape, kind)
        rows, columns, size = self.kernels.shape
        return explain_sizes("C3A", (rows * size, columns * size), shape)

    def apply_to(self, weight: Array) -> Array:
        rows, columns, size = self.kernels.shape
        steps = np.arange(size)
        circles = widen(self.kernels)[:, :, (steps[None] - steps[:, None]) % size]
        dense: Floats = circles.transpose(0, 2, 1, 3).reshape(rows * size, columns * size)
        return widen(weight) + dense / np.float32(weight.shape[1])

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def read_c3a(module: Module) -> Contribution:
    """`c3a_kernel` `[out / b, in / b, b]`. Raises TensorError: it is missing, or empty."""
    kernels = module.tensor("c3a_kernel", 3)
    module.must(kernels.size > 0, "C3A must have kernels")
    return Contribution(change=C3A(kernels))


METHOD = Method(
    peft_type="C3A",
    name="C3A",
    read=read_c3a,
    docs=(DocsRow("`C3A`", "fold"),),
    tensors=bare_parameters("c3a_kernel"),
    fields=frozenset({"block_size", "block_size_pattern"}),
)
