"""DeLoRA: LoRA whose strength is trained apart from its direction.

DeLoRA (Bini et al. 2025), equation 8: `W = W0 + λ / r · Σ b_i · a_iᵀ / (‖b_i‖ · ‖a_i‖)`, times the norms of the columns
of W0. The reference is PEFT 0.21: `delora/layer.py`, `get_delta_weight`.
"""

from __future__ import annotations

import numpy as np

from onnx_lora.adapters.adapter import Delta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import widen

__all__ = ["METHOD", "read_delora"]

# PEFT's lower bound of a norm.
_LEAST_NORM = 1e-4


def read_delora(module: Module) -> Contribution:
    """`delora_A` `[r, in]`, `delora_B` `[out, r]`, `delora_lambda` `[1]` and `delora_w_norm` `[in]`, the norms of the
    base's columns: a pair of factors that needs no scale.

    Raises TensorError: one of them is missing, the rank is not the config's, or the shapes do not fit.
    """
    a = widen(module.tensor("delora_A", 2))
    b = widen(module.tensor("delora_B", 2))
    strength = widen(module.vector("delora_lambda"))
    norms = widen(module.vector("delora_w_norm"))
    rank, inputs = a.shape
    module.must_have_rank(rank)
    fits = strength.size == 1 and norms.size == inputs and b.shape[1] == rank
    module.must(fits, "DeLoRA's tensors must fit")
    norms_of_a = np.maximum(np.linalg.norm(a, axis=1), _LEAST_NORM)
    norms_of_b = np.maximum(np.linalg.norm(b, axis=0), _LEAST_NORM)
    by_rank = strength[0] / rank / (norms_of_a * norms_of_b)
    return Contribution(Delta(a * norms, b * by_rank, 1.0))


METHOD = Method(
    peft_type="DELORA",
    name="DeLoRA",
    read=read_delora,
    docs=(DocsRow("`DELORA`", "delta"),),
    tensors=bare_parameters("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    fields=frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "r", "rank_pattern"}),
    rank="r",
    patterns=True,
)
