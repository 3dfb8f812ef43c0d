"""A PEFT folder out of an adapter: its config and its tensors, such that PEFT computes the same. It knows no package.

The reference is PEFT 0.21: `LoraConfig`, `get_pattern_key`, `set_peft_model_state_dict`."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from onnx_lora.adapters.adapter import Delta, PortableAdapter
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.errors import UnsupportedAdapterError
from onnx_lora.kinds import Conv, Embedding
from onnx_lora.points import Array

__all__ = ["alpha_for", "contiguous", "lora_config", "lora_tensors", "multiplied_in", "refuse", "write_peft"]

# PEFT's word for a config whose adapter has whole weights and nothing else.
_NO_TARGETS = "dummy-target-modules"
_PREFIX = "base_model.model."


def write_peft(adapter: PortableAdapter, folder: Path) -> None:
    """Write the folder, which must not exist: `adapter_config.json` and `adapter_model.safetensors`.

    Raises UnsupportedAdapterError: what one config of PEFT cannot say.
    """
    refuse(adapter, "PEFT's LoRA", dora_problems(adapter.deltas) + _whole_problems(adapter))
    deltas = {module: with_alpha(delta) for module, delta in adapter.deltas.items()}
    tensors: dict[str, Array] = {}
    for name, values in lora_tensors(deltas).items():
        tensors[f"{_PREFIX}{name}"] = values
    saved_modules: set[str] = set()
    has_biases = False
    for name, replacement in adapter.replacements.items():
        module, _, parameter = name.rpartition(".")
        inside = f"{module}.base_layer" if module in deltas else module
        tensors[f"{_PREFIX}{inside}.{parameter}"] = replacement.value
        if not replacement.in_place:
            saved_modules.add(module)
        elif parameter == "bias":
            has_biases = True
    config = lora_config(deltas) | {
        "base_model_name_or_path": adapter.origin.base_model or None,
        "bias": "all" if has_biases else "none",
        "modules_to_save": sorted(saved_modules) or None,
        "inference_mode": True,
        "task_type": None,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(contiguous(tensors), {"format": "pt"}))


def _whole_problems(adapter: PortableAdapter) -> list[str]:
    """Whole weights that a PEFT folder cannot hold."""
    problems: list[str] = []
    for name, replacement in adapter.replacements.items():
        if replacement.operation != "set":
            done = "added to" if replacement.operation == "add" else "multiplied with"
            problems.append(f"{name}: is {done} the base's own, and PEFT only replaces; merge it")
    for name, replacement in adapter.replacements.items():
        if name.rpartition(".")[0] in adapter.deltas and not replacement.in_place:
            problems.append(f"{name}: its module has factors too, and PEFT keeps one or the other")
    return problems


def refuse(adapter: PortableAdapter, format: str, problems: list[str]) -> None:
    """Raises UnsupportedAdapterError: there are problems, or nothing to write."""
    if not problems and not adapter.deltas and not adapter.replacements:
        problems = ["it holds nothing"]
    if problems:
        raise UnsupportedAdapterError(
            f"{format} cannot hold adapter {adapter.name!r}", path=adapter.origin.path, problems=problems
        )


def dora_problems(deltas: Mapping[str, Delta]) -> list[str]:
    """Why one config cannot say which modules have DoRA: it is for all of them or for none."""
    with_dora = [module for module, delta in deltas.items() if delta.magnitude is not None]
    without = [module for module, delta in deltas.items() if delta.magnitude is None]
    if not with_dora or not without:
        return []
    return [
        f"{without[0]} (and {len(without) - 1} more): has no DoRA, and {with_dora[0]} has; one config says it for all"
    ]


def lora_config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """The fields of `LoraConfig` that say ranks, alphas and targets; names in patterns are anchored and exact."""
    ranks = {module: delta.rank for module, delta in deltas.items()}
    alphas = {module: alpha_for(delta) for module, delta in deltas.items()}
    rank = _most_common(ranks, 8)
    alpha = _most_common(alphas, 8)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": sorted(deltas) or _NO_TARGETS,
        "use_dora": any(delta.magnitude is not None for delta in deltas.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _pattern(numbers: Mapping[str, float], default: float) -> dict[str, float]:
    """The modules whose number is another than the config's."""
    return {_anchored(module): number for module, number in numbers.items() if number != default}


def _anchored(module: str) -> str:
    return f"^{re.escape(module)}"


def _most_common(values: Mapping[str, Any], default: Any) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else default


def alpha_for(delta: Delta) -> float:
    """alpha with alpha / r equal to the scale, as near as it comes; whole where it is that."""
    near = delta.scale * delta.rank
    alpha = near
    for candidate in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if lora_scale(candidate, delta.rank) == delta.scale:
            alpha = candidate
            break
    return int(alpha) if alpha == int(alpha) else alpha


def with_alpha(delta: Delta) -> Delta:
    """The delta itself, or with the scale in B where no alpha gives that scale exactly."""
    has_alpha = lora_scale(alpha_for(delta), delta.rank) == delta.scale
    return delta if has_alpha else multiplied_in(delta, 1.0)


def multiplied_in(delta: Delta, scale: float) -> Delta:
    """The same change at another scale: what is left of the old one goes into B, rounded once."""
    if delta.scale == scale:
        return delta
    wide = np.promote_types(delta.b.dtype, np.float32)
    b = (delta.b.astype(np.float64) * (delta.scale / scale)).astype(wide)
    return Delta(delta.a, b, scale, delta.kind, delta.magnitude)


def lora_tensors(deltas: Mapping[str, Delta]) -> dict[str, Array]:
    """PEFT's tensors by PEFT's names, as its checkpoints have them."""
    tensors: dict[str, Array] = {}
    for module, delta in deltas.items():
        if isinstance(delta.kind, Embedding):
            tensors[f"{module}.lora_embedding_A"], tensors[f"{module}.lora_embedding_B"] = delta.a, delta.b
        else:
            kernel = (1,) * (delta.a.ndim - 2)
            tensors[f"{module}.lora_A.weight"] = delta.a
            tensors[f"{module}.lora_B.weight"] = delta.b.reshape(*delta.b.shape, *kernel)
        if delta.magnitude is not None:
            shape = (1, -1, *(1,) * (delta.a.ndim - 2)) if isinstance(delta.kind, Conv) else (-1,)
            tensors[f"{module}.lora_magnitude_vector"] = delta.magnitude.reshape(shape)
    return tensors


def contiguous(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """What safetensors takes: C order, little-endian."""
    return {name: np.ascontiguousarray(values) for name, values in tensors.items()}
