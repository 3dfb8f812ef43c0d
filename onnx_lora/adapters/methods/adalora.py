"""AdaLoRA: LoRA as a singular value decomposition, of which small singular values are pruned in training.

AdaLoRA (Zhang et al. 2023), equation 3: `W = W0 + alpha / ranknum · B · diag(E) · A`. The reference is PEFT 0.21:
`adalora/layer.py`, `get_delta_weight`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.lora_fields import LORA_FIELDS, LORA_REFUSED
from onnx_lora.adapters.methods.method import (
    RETRAIN,
    Contribution,
    DocsRow,
    Fields,
    Method,
    Module,
    Refusal,
    bare_parameters,
)
from onnx_lora.adapters.methods.weights import widen
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.adapters.scale import lora_scale

__all__ = ["METHOD", "read_adalora"]

# How AdaLoRA's rank_pattern names a module: by its singular values, in some versions with the adapter's name behind.
_SINGULAR = re.compile(r"^(?:base_model\.model\.)*(?P<module>.+)\.lora_E(?:\.[^.]+)?$")

# PEFT adds it to the number of ranks before it divides by that.
_EPSILON = 1e-5


def read_adalora(module: Module) -> Contribution:
    """`lora_A` `[r, in]`, `lora_B` `[out, r]`, `lora_E` `[r, 1]` and, if it was saved, `ranknum` `[1]`; r is what
    `rank_pattern` left of the config's `init_r`. Where it left nothing, the module stays at the base.

    Raises TensorError: one of them is missing, or they are not of that rank.
    """
    a = module.tensor("lora_A", 2)
    b = module.tensor("lora_B", 2)
    e = module.tensor("lora_E", 2)
    marks = module.fields.once(_read_marks).get(module.name)
    rank = module.rank
    if marks is not None:
        are_marks = isinstance(marks, list) and len(marks) == rank
        module.must(are_marks, f"rank_pattern must have {rank} marks")
        rank = sum(bool(mark) for mark in marks)
    has_rank = a.shape[0] == rank == b.shape[1] and e.shape == (rank, 1)
    module.must(has_rank, f"the rank must be {rank} by init_r and rank_pattern")
    if rank == 0:
        return Contribution(note=f"{module.name}: AdaLoRA pruned it to rank 0, and it stays at the base")
    alpha = module.alpha if module.alpha > 0 else rank
    scale = lora_scale(alpha, _read_divisor(module) + _EPSILON)
    return Contribution(MatrixDelta(widen(a) * widen(e), b, scale))


def _read_divisor(module: Module) -> float:
    """The number of ranks that PEFT divides by."""
    if not module.has("ranknum"):
        return float(module.rank)
    stored = module.vector("ranknum")
    module.must(stored.size == 1 and bool(np.isfinite(stored).all()), "ranknum must be one number")
    return float(stored[0])


def _read_marks(fields: Fields) -> dict[str, Any]:
    """`rank_pattern` of the config by module: for each rank whether it was kept. The first of two entries for a module
    counts.

    Raises TensorError: it is no table.
    """
    pattern = fields.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise TensorError(f"rank_pattern of the config must map modules to marks, and is {abbreviate(pattern)}")
    marks: dict[str, Any] = {}
    for key, kept in pattern.items():
        found = _SINGULAR.match(key)
        if found:
            marks.setdefault(found["module"], kept)
    return marks


# AdaLoRA inherits LoRA's fields, and PEFT's AdaLoRA does nothing with these.
_UNUSED = (
    "enable_lora",
    "ensure_weight_tying",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)

METHOD = Method(
    peft_type="ADALORA",
    name="AdaLoRA",
    read=read_adalora,
    docs=(DocsRow("`ADALORA`", "delta; a module pruned to rank 0 stays at the base"),),
    tensors=bare_parameters("lora_A", "lora_B", "lora_E", "ranknum"),
    fields=(LORA_FIELDS - set(_UNUSED))
    | {"beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"},
    refused=LORA_REFUSED | dict.fromkeys(_UNUSED, Refusal("PEFT's AdaLoRA does nothing with it", RETRAIN)),
    rank="init_r",
    alpha="lora_alpha",
)
