"""HiRA: each number of the weight is changed in proportion to itself.

HiRA (Huang et al. 2025), equation 3: `W = W0 + W0 ∘ (B · A)`. There is no scale. The reference is PEFT 0.21:
`hira/layer.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import explain_kind, explain_sizes, widen
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
            kinds = "embeddings" if self.on_embedding else "other modules"
            return explain_kind("HiRA of this file", kinds, shape, kind)
        rows, columns = len(self.b), self.a.shape[1]
        sizes = (columns, rows) if self.on_embedding else (rows, columns)
        return explain_sizes("HiRA", sizes, shape)

    def apply_to(self, weight: Array) -> Array:
        own = widen(weight)
        share = widen(self.b) @ widen(self.a)
        if self.on_embedding:
            share = share.T
        return own + own * share.reshape(weight.shape)

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def read_hira(module: Module) -> Contribution:
    """`hira_A` `[r, in, *kernel]` and `hira_B` `[out, r]`, with axes of size 1 behind; of an embedding
    `hira_embedding_A` `[r, rows]` and `hira_embedding_B` `[features, r]`.

    The config's rank is not looked at: it scales nothing, and PEFT 0.21 forgets its rank_pattern.

    Raises TensorError: one of them is missing, or they are of two ranks.
    """
    on_embedding = module.has("hira_embedding_A")
    prefix = "hira_embedding_" if on_embedding else "hira_"
    a = module.tensor(f"{prefix}A")
    b = module.tensor(f"{prefix}B")
    are_factors = a.ndim == b.ndim >= 2 and a.size > 0 and b.size > 0
    has_rank = are_factors and len(a) == b.shape[1] and math.prod(b.shape[2:]) == 1
    module.must(has_rank, "HiRA's factors must be of one rank")
    return Contribution(change=HiRA(a.reshape(len(a), -1), b.reshape(b.shape[:2]), on_embedding))


METHOD = Method(
    peft_type="HIRA",
    name="HiRA",
    read=read_hira,
    docs=(DocsRow("`HIRA`", "fold; on embeddings and convolutions too"),),
    tensors=bare_parameters("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    fields=frozenset({"hira_dropout", "r", "rank_pattern"}),
)
