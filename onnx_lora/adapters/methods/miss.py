"""MiSS: one block is added again and again along the inputs.

MiSS (Kang and Yin 2025), section 3: `W = W0 + [Dᵀ Dᵀ … Dᵀ]`, with D `[r, out]`; "mini": D is repeated along the outputs
too; "bat": D is a block of r · r for each r outputs, and what is added is `W0 · D + D`, block by block. There is no
scale. The reference is PEFT 0.21: `miss/layer.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import Floats, explain_kind, factors_pay, widen
from onnx_lora.adapters.problems import abbreviate
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "MiSS", "read_miss"]


@dataclass(frozen=True)
class MiSS:
    """`block` `[r, out]`; of the form "mini" `[r, outputs that repeat]`, of "bat" `[out / r, r, r]`."""

    block: Array
    form: Literal["plain", "mini", "bat"]

    @property
    def method(self) -> str:
        return "MiSS"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return explain_kind("MiSS", "linear modules", shape, kind)
        block = self.block.shape
        outputs, inputs = shape
        if self.form == "bat":
            fits = inputs % block[-1] == 0 and outputs == block[0] * block[-1]
        elif self.form == "mini":
            fits = outputs % block[1] == 0 and inputs >= block[0]
        else:
            fits = outputs == block[1] and inputs >= block[0]
        if fits:
            return None
        return f"MiSS has a block of shape {block} ({self.form}), and the weight has shape {shape}"

    def apply_to(self, weight: Array) -> Array:
        own = widen(weight)
        if self.form != "bat":
            a, b = self._factors(weight.shape)
            return own + b @ a
        blocks = widen(self.block)
        size = blocks.shape[-1]
        by_block = own.reshape(len(own) // size, size, -1, size)  # block of outputs, output, block of inputs, input
        tiles = by_block.transpose(2, 0, 1, 3)
        change = tiles @ blocks + blocks
        return own + change.transpose(1, 2, 0, 3).reshape(own.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        if self.form == "bat" or not factors_pay(len(self.block), weight.shape):
            return None
        return MatrixDelta(*self._factors(weight.shape))

    def output_scale(self) -> Array | None:
        return None

    def _factors(self, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
        """A `[r, in]` adds up every r-th input; B `[out, r]` is the block, repeated along the outputs."""
        outputs, inputs = shape
        block = widen(self.block)
        rank, repeated = block.shape
        identity = np.eye(rank, dtype=block.dtype)
        copies = math.ceil(inputs / rank)
        a = np.tile(identity, copies)[:, :inputs]
        b = np.tile(block, outputs // repeated).T
        return a, b


def read_miss(module: Module) -> Contribution:
    """`miss_block` `[r, out]`; of `init_weights` "mini" `[r, mini_r]`, of "bat" `[out / r, r, r]`.

    Raises TensorError: it is missing, not of the config's `r` and `mini_r`, or `init_weights` is none of those.
    """
    form = module.fields.get("init_weights", True)
    module.must(
        form in (True, False, None, "bat", "mini"), f"init_weights {abbreviate(form)} of MiSS is not known here"
    )
    rank = module.rank
    if form == "bat":
        block = module.tensor("miss_block", 3)
        module.must(block.shape[1:] == (rank, rank), f"MiSS must have blocks of the config's r, {rank}")
        return Contribution(change=MiSS(block, "bat"))
    block = module.tensor("miss_block", 2)
    module.must(len(block) == rank and block.size > 0, f"MiSS must have a block of the config's r, {rank}")
    if form != "mini":
        return Contribution(change=MiSS(block, "plain"))
    module.must(block.shape[1] == module.count("mini_r"), "MiSS must have a block of the config's mini_r")
    return Contribution(change=MiSS(block, "mini"))


METHOD = Method(
    peft_type="MISS",
    name="MiSS",
    read=read_miss,
    docs=(DocsRow("`MISS`", 'delta; "bat" folds'),),
    tensors=bare_parameters("miss_block"),
    fields=frozenset({"mini_r", "miss_dropout", "r"}),
    rank="r",
)
