"""HiRA: each number of the weight is changed in proportion to itself.

HiRA (Huang et al. 2025), equation 3: `W = W0 + W0 ∘ (B · A)`. There is no scale. The reference is PEFT 0.21:
`hira/layer.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.arrays import wide
from onnx_lora.adapters.methods.method import DocsRow, Method, Module, Part, bare_parameters
from onnx_lora.adapters.methods.shapes import kernel_unlike, not_for
from onnx_lora.kinds import Embedding, Kind
from onnx_lora.points import Array

__all__ = ["METHOD", "HiRA", "read_hira"]


@dataclass(frozen=True)
class HiRA:
    """`W = W0 + W0 ∘ (b · a)`: `a` `[r, in · kernel]`, `b` `[out, r]`; of an embedding `[r, rows]`, `[features, r]`."""

    a: Array
    b: Array
    on_embedding: bool = False

    @property
    def method(self) -> str:
        return "HiRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Embedding) != self.on_embedding:
            return not_for("HiRA of this file", "embeddings" if self.on_embedding else "other modules", shape, kind)
        sizes = (len(self.b), self.a.shape[1])
        return kernel_unlike("HiRA", sizes[::-1] if self.on_embedding else sizes, shape)

    def apply_to(self, weight: Array) -> Array:
        own, share = wide(weight), wide(self.b) @ wide(self.a)
        return own + own * (share.T if self.on_embedding else share).reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def read_hira(module: Module) -> Part:
    """`hira_A` `[r, in, *kernel]` and `hira_B` `[out, r]`, with axes of size 1 behind; of an embedding
    `hira_embedding_A` `[r, rows]` and `hira_embedding_B` `[features, r]`.

    The config's rank is not looked at: it scales nothing, and PEFT 0.21 forgets its rank_pattern.

    Raises TensorError: one of them is missing, or they are of two ranks.
    """
    embedding = module.has("hira_embedding_A")
    prefix = "hira_embedding_" if embedding else "hira_"
    a, b = module.tensor(f"{prefix}A"), module.tensor(f"{prefix}B")
    are_factors = a.ndim == b.ndim >= 2 and a.size > 0 and b.size > 0
    module.must(
        are_factors and len(a) == b.shape[1] and math.prod(b.shape[2:]) == 1, "HiRA's factors must be of one rank"
    )
    return Part(change=HiRA(a.reshape(len(a), -1), b.reshape(b.shape[:2]), embedding))


METHOD = Method(
    peft_type="HIRA",
    name="HiRA",
    read=read_hira,
    docs=(DocsRow("`HIRA`", "fold; on embeddings and convolutions too"),),
    tensors=bare_parameters("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    fields=frozenset({"hira_dropout", "r", "rank_pattern"}),
)
