"""LoRA, with all that its layers can be in PEFT.

LoRA (Hu et al. 2021), section 4.1: `W = W0 + scale · B · A`, scale alpha / r; rsLoRA (Kalajdzievski 2023): alpha / √r.
DoRA, BD-LoRA, QA-LoRA, MergedLinear and LoRA of bare parameters have files in `lora_layers/`, trained tokens have
`tokens.py`. The reference is PEFT 0.21: `lora/layer.py`, `lora/variants.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnx_lora.adapters.adapter import Delta, Replacement
from onnx_lora.adapters.methods import tokens
from onnx_lora.adapters.methods.lora_fields import LORA_FIELDS, LORA_REFUSED
from onnx_lora.adapters.methods.lora_layers import bdlora, dora, merged_linear, parameters, qalora
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module
from onnx_lora.adapters.methods.tokens import LORA_TOKENS
from onnx_lora.adapters.problems import TensorError
from onnx_lora.kinds import EMBEDDING, Conv
from onnx_lora.points import Array

__all__ = ["METHOD", "read_lora"]

_MOST_AXES = 5  # of a convolution's factor: rank, channels, and a kernel of three axes


def read_lora(module: Module) -> Contribution:
    """A pair of factors by the kind of module, shapes as in `Delta`: `lora_A` and `lora_B`, of a table of embeddings
    `lora_embedding_A` and `lora_embedding_B`. With trained tokens, with `use_bdlora` and `use_qalora` it is a change.

    Raises TensorError: a tensor is missing, the rank is not the config's, the shapes do not fit, or the config's
    options and the tensors contradict each other.
    """
    if module.has(LORA_TOKENS):
        return tokens.read_lora_tokens(module)
    if module.has("lora_embedding_A") or module.has("lora_embedding_B"):
        return _read_embedding(module)
    a, b = _read_factors(module, "lora_")
    magnitude = dora.read_magnitude(module, len(b))
    bias = _read_bias(module, len(b))
    if module.fields.get("enable_lora") is not None:
        module.must(magnitude is None and not bias, "enable_lora goes with neither use_dora nor lora_bias")
        return Contribution(merged_linear.read_merged_linear(module, a, b))
    if a.ndim > 2 or b.ndim > 2:
        return Contribution(_read_convolution(module, a, b, magnitude), whole=bias)
    if module.fields.get("use_bdlora"):
        in_blocks = bdlora.read_bdlora(module, a, b)
        if in_blocks is not None:
            return Contribution(change=in_blocks, whole=bias)
    _must_have_rank(module, a, b)
    if module.fields.get("use_qalora"):
        return Contribution(change=qalora.read_qalora(module, a, b), whole=bias)
    return Contribution(Delta(a, b, module.scale, magnitude=magnitude), whole=bias)


def _read_embedding(module: Module) -> Contribution:
    a, b = _read_factors(module, "lora_embedding_")
    magnitude = dora.read_magnitude(module, len(b))
    _must_have_rank(module, a, b)
    return Contribution(Delta(a, b, module.scale, EMBEDDING, magnitude))


def _read_convolution(module: Module, a: Array, b: Array, magnitude: Array | None) -> Delta:
    """`a` `[r, channels / groups, *kernel]`, `b` `[out, r / groups, 1, …]`."""
    has_axes = a.ndim == b.ndim <= _MOST_AXES
    if not has_axes or math.prod(b.shape[2:]) != 1:
        raise TensorError(
            f"lora_A and lora_B of a convolution must have the same number of axes, and those of B behind the second "
            f"must be of size 1; their shapes are {a.shape} and {b.shape}"
        )
    matrix: Array = b.reshape(b.shape[:2])
    rank_of_group = max(1, matrix.shape[1])
    groups = max(1, len(a) // rank_of_group)
    _must_have_rank(module, a, matrix, groups=groups)
    return Delta(a, matrix, module.scale, Conv(a.shape[2:], groups), magnitude)


def _read_factors(module: Module, prefix: str) -> tuple[Array, Array]:
    """The tensors A and B behind the prefix. Raises TensorError: one is missing, or has too few axes."""
    name_a, name_b = f"{prefix}A", f"{prefix}B"
    for name, other in ((name_b, name_a), (name_a, name_b)):
        if not module.has(name):
            found = other if module.has(other) else ", ".join(module.tensors)
            raise TensorError(f"has {found} and no {name}; get the whole file")
    a = module.tensor(name_a)
    b = module.tensor(name_b)
    if min(a.ndim, b.ndim) < 2:
        raise TensorError(
            f"{name_a} and {name_b} must have 2 axes or more, and have shapes {a.shape} and {b.shape}: they were not "
            "gathered from shards; save the adapter again"
        )
    return a, b


def _must_have_rank(module: Module, a: Array, b: Array, *, groups: int = 1) -> None:
    """Raises TensorError: the ranks of the factors are not the config's, or they are no factors at all."""
    rank_of_a = a.shape[0]
    outputs, rank_of_b = b.shape[:2]
    has_rank = rank_of_a == module.rank == rank_of_b * groups
    are_factors = b.ndim == 2 and a.size > 0 and b.size > 0 and outputs % groups == 0
    if has_rank and are_factors:
        return
    raise TensorError(
        f"the rank must be {module.rank} by adapter_config.json, and lora_A {a.shape} has rank {rank_of_a}, "
        f"lora_B {b.shape} has {rank_of_b}; get the config and the weights of one training"
    )


def _read_bias(module: Module, outputs: int) -> Mapping[str, Replacement]:
    """`lora_bias`: a bias `[out]` on B, which adds to the module's own, times the scale."""
    wanted = bool(module.fields.get("lora_bias"))
    found = module.has("lora_B.bias")
    if wanted and not found:
        raise TensorError("has no bias on lora_B, and the config says lora_bias; get the whole file")
    if found and not wanted:
        raise TensorError(
            "has a bias on lora_B, which PEFT would ignore, because the config does not say lora_bias; correct "
            "adapter_config.json, or remove it"
        )
    if not found:
        return {}
    bias = module.tensor("lora_B.bias", 1)
    if bias.size != outputs:
        raise TensorError(f"lora_B's bias must have {outputs} values, and has {bias.size}")
    if module.fields.get("use_dora"):
        raise TensorError("lora_bias does not go with use_dora; PEFT itself refuses it")
    wide = np.promote_types(bias.dtype, np.float32)
    scaled = (bias.astype(np.float64) * module.scale).astype(wide)
    return {f"{module.name}.bias": Replacement(scaled, operation="add")}


METHOD = Method(
    peft_type="LORA",
    name="LoRA",
    read=read_lora,
    docs=(
        DocsRow("`LORA`; rsLoRA, EVA, LoRA-FA, MiCA, VeLoRA", "delta; on embeddings and convolutions too"),
        dora.DOCS,
        bdlora.DOCS,
        qalora.DOCS,
        merged_linear.DOCS,
        parameters.DOCS,
        tokens.LORA_DOCS,
        DocsRow(
            "`ensure_weight_tying`",
            "delta or whole weight of each of the tied modules; refused where the file holds only one of them",
        ),
        DocsRow(
            "embeddings saved whole (resized, `save_embedding_layers`)",
            "whole weights, for the modules that are tied to them too, as PEFT writes both at one place",
        ),
        DocsRow("PiSSA, OLoRA, CorDA, LoRA-GA", "delta of twice the rank, with the initial adapter"),
    ),
    # With what may stand behind an adapter's name: modules have a weight, bare parameters nothing.
    tensors={
        "lora_A": ("weight",),
        "lora_B": ("weight", "bias"),
        "lora_embedding_A": ("",),
        "lora_embedding_B": ("",),
        dora.MAGNITUDE: ("", "weight"),
        "lora_velora_embed": ("",),
        LORA_TOKENS: ("",),
    },
    of_parameters=parameters.ParameterLora,
    unread=frozenset({"lora_velora_embed"}),  # of VeLoRA's backward pass
    fields=LORA_FIELDS,
    refused=LORA_REFUSED,
    rank="r",
    alpha="lora_alpha",
    patterns=True,
    variants={"use_dora": "DoRA", "use_bdlora": "BD-LoRA", "use_qalora": "QA-LoRA", "use_rslora": "rsLoRA"},
)
