"""LoRA of PEFT, with all that its layers can be: what a module's tensors come to.

The reference is PEFT 0.21: `lora/layer.py`, `lora/dora.py`, `lora/variants.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_lora.adapters.adapter import Delta, Replacement
from onnx_lora.adapters.formats.files.reading import shown
from onnx_lora.adapters.formats.peft.merged_linear import merged_linear
from onnx_lora.adapters.formats.peft.method import Module, Part, TensorError
from onnx_lora.adapters.formats.peft.tokens import LORA_TOKENS, lora_tokens
from onnx_lora.adapters.methods.bdlora import BDLoRA
from onnx_lora.adapters.methods.qalora import QALoRA
from onnx_lora.kinds import EMBEDDING, Conv
from onnx_lora.points import Array

__all__ = ["LORA_TENSORS", "lora"]

# With what may stand behind an adapter's name: modules have a weight, bare parameters nothing.
LORA_TENSORS = {
    "lora_A": ("weight",),
    "lora_B": ("weight", "bias"),
    "lora_embedding_A": ("",),
    "lora_embedding_B": ("",),
    "lora_magnitude_vector": ("", "weight"),
    "lora_velora_embed": ("",),
    LORA_TOKENS: ("",),
}

_BD_FIELDS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}

# Each of them is looked for in every module's name.
_MOST_BD_NAMES = 1000


def lora(module: Module) -> Part:
    """A delta; trained tokens, BD-LoRA and QA-LoRA are changes. Raises TensorError."""
    if module.has(LORA_TOKENS):
        return lora_tokens(module)
    embedding = module.has("lora_embedding_A") or module.has("lora_embedding_B")
    a, b = _both(module, "lora_embedding_" if embedding else "lora_")
    scale, magnitude = module.config.ranks.scale_of(module.name), _magnitude(module, len(b))
    if embedding:
        _check_rank(module, a, b)
        return Part(Delta(a, b, scale, EMBEDDING, magnitude))
    whole = _bias(module, len(b), scale)
    if (enabled := module.config.fields.get("enable_lora")) is not None:
        return Part(_merged_linear(module, a, b, enabled))
    if a.ndim > 2 or b.ndim > 2:
        b = _pointwise(a, b)
        groups = max(1, len(a) // max(1, b.shape[1]))
        _check_rank(module, a, b, groups=groups)
        return Part(Delta(a, b, scale, Conv(a.shape[2:], groups), magnitude), whole=whole)
    if module.config.fields.get("use_bdlora") and any(blocks := _blocks(module)):
        return Part(change=_in_blocks(module, a, b, scale, blocks), whole=whole)
    _check_rank(module, a, b)
    if module.config.fields.get("use_qalora"):
        module.must(magnitude is None, "use_qalora does not go with use_dora")
        return Part(change=QALoRA(a, b, scale, module.count("qalora_group_size")), whole=whole)
    return Part(Delta(a, b, scale, magnitude=magnitude), whole=whole)


def _merged_linear(module: Module, a: Array, b: Array, enabled: Any) -> Delta:
    """PEFT before 0.4: several projections in one weight, those with factors marked."""
    if not isinstance(enabled, list) or not all(type(each) is bool for each in enabled) or not any(enabled):
        raise TensorError(f"enable_lora must mark the projections that have factors, and is {shown(enabled)}")
    ranks = module.config.ranks
    module.must(
        b.ndim > 1 and b.shape[1] == ranks.rank_of(module.name),
        f"the rank must be {ranks.rank_of(module.name)} by adapter_config.json, and lora_B has shape {b.shape}",
    )
    delta = merged_linear(a, b, enabled, ranks.scale_of(module.name))
    if isinstance(delta, str):
        raise TensorError(delta)
    return delta


def _both(module: Module, prefix: str) -> tuple[Array, Array]:
    for has, lacks in ("AB", "BA"):
        if not module.has(f"{prefix}{lacks}"):
            found = f"{prefix}{has}" if module.has(f"{prefix}{has}") else ", ".join(module.tensors)
            raise TensorError(f"has {found} and no {prefix}{lacks}; get the whole file")
    a, b = module.tensor(f"{prefix}A"), module.tensor(f"{prefix}B")
    if min(a.ndim, b.ndim) < 2:
        raise TensorError(
            f"{prefix}A and {prefix}B must have 2 axes or more, and have shapes {a.shape} and {b.shape}: not gathered "
            "from shards; save it again"
        )
    return a, b


def _check_rank(module: Module, a: Array, b: Array, *, groups: int = 1) -> None:
    rank = module.config.ranks.rank_of(module.name)
    if a.shape[0] == rank == b.shape[1] * groups and a.size and b.size and b.shape[0] % groups == 0 and b.ndim == 2:
        return
    raise TensorError(
        f"the rank must be {rank} by adapter_config.json, and lora_A {a.shape} has rank {a.shape[0]}, "
        f"lora_B {b.shape} has {b.shape[1]}; get the config and the weights of one training"
    )


def _pointwise(a: Array, b: Array) -> Array:
    """A convolution's B, `[out, r / groups, 1, …]`, as a matrix."""
    if not (a.ndim == b.ndim <= 5 and math.prod(b.shape[2:]) == 1):
        raise TensorError(
            f"lora_A and lora_B of a convolution must have as many axes, B's all of size 1 behind the second, and have "
            f"shapes {a.shape} and {b.shape}"
        )
    return b.reshape(b.shape[:2])


def _magnitude(module: Module, outputs: int) -> Array | None:
    wanted, found = bool(module.config.fields.get("use_dora")), module.has("lora_magnitude_vector")
    if wanted != found:
        raise TensorError(
            "has no lora_magnitude_vector, and the config says use_dora; get the whole file"
            if wanted
            else "has lora_magnitude_vector, DoRA's, and PEFT would ignore it: the config does not say use_dora; "
            "correct adapter_config.json, or remove it"
        )
    if not found:
        return None
    vector = module.vector("lora_magnitude_vector")
    if vector.size != outputs:
        raise TensorError(
            f"lora_magnitude_vector must have {outputs} values, one for each output, and has {vector.size}"
        )
    return vector


def _bias(module: Module, outputs: int, scale: float) -> Mapping[str, Replacement]:
    """`lora_bias`: a bias on B, which adds to the module's own."""
    wanted, found = bool(module.config.fields.get("lora_bias")), module.has("lora_B.bias")
    if wanted != found:
        raise TensorError(
            "has no bias on lora_B, and the config says lora_bias; get the whole file"
            if wanted
            else "has a bias on lora_B, which PEFT would ignore, because the config does not say lora_bias; correct "
            "adapter_config.json, or remove it"
        )
    if not found:
        return {}
    bias = module.tensor("lora_B.bias", 1)
    if bias.size != outputs:
        raise TensorError(f"lora_B's bias must have {outputs} values, and has {bias.size}")
    if module.config.fields.get("use_dora"):
        raise TensorError("lora_bias does not go with use_dora; PEFT itself refuses it")
    scaled = (bias.astype(np.float64) * scale).astype(np.promote_types(bias.dtype, np.float32))
    return {f"{module.name}.bias": Replacement(scaled, operation="add")}


def _blocks(module: Module) -> tuple[int, int]:
    """BD-LoRA: the number of blocks of A and of B, 0 for a plain factor. PEFT's `BdLoraLinearVariant`."""
    fields = module.config.once(_bd_fields)
    blocks = fields.get("nblocks", 1)
    in_a, in_b = (any(name in module.name for name in fields.get(f"target_modules_bd_{side}") or ()) for side in "ab")
    if (in_a and in_b) or (fields.get("match_strict", True) and not (in_a or in_b)):
        raise TensorError("use_bdlora of the config must make one of A and B of blocks; PEFT would not load it")
    return blocks * in_a, blocks * in_b


def _in_blocks(module: Module, a: Array, b: Array, scale: float, blocks: tuple[int, int]) -> BDLoRA:
    count, rank = max(blocks), module.config.ranks.rank_of(module.name)
    ranks = len(a), b.shape[1] * (blocks[1] or 1)
    module.must(
        ranks == (rank, rank) and len(a if blocks[0] else b) % count == 0 and a.size > 0 and b.size > 0,
        f"the rank must be {rank} by adapter_config.json, with a factor in {count} blocks",
    )
    if module.config.fields.get("use_dora") or module.config.fields.get("use_qalora"):
        raise TensorError("use_bdlora does not go with use_dora or use_qalora; PEFT itself refuses it")
    return BDLoRA(a, b, scale, count, bool(blocks[0]))


def _bd_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """BD-LoRA's fields. As in PEFT, its names stand anywhere in a module's. Raises TensorError."""
    fields = config["use_bdlora"]
    if not isinstance(fields, dict) or not set(fields) <= _BD_FIELDS:
        raise TensorError(f"use_bdlora of the config must hold {', '.join(sorted(_BD_FIELDS))}, and is {shown(fields)}")
    lists = [fields.get(f"target_modules_bd_{side}") or [] for side in "ab"]
    are_names = all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
    blocks = fields.get("nblocks", 1)
    if type(blocks) is not int or blocks < 1 or not are_names:
        raise TensorError(f"use_bdlora of the config must hold names and a number of blocks, and is {shown(fields)}")
    if max(map(len, lists)) > _MOST_BD_NAMES:
        raise TensorError(f"use_bdlora of the config must hold at most {_MOST_BD_NAMES} names; write the ends of names")
    return fields
