"""A PEFT folder out of an adapter: its config and its tensors, such that PEFT computes the same. It knows no package.

The reference is PEFT 0.21: `LoraConfig`, `get_pattern_key`, `set_peft_model_state_dict`."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from onnx_lora.adapters.adapter import Delta, PortableAdapter
from onnx_lora.adapters.formats.peft.config import CONFIG
from onnx_lora.adapters.formats.writing import dora_problems, refuse_writing, rescale, save_safetensors
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.kinds import Conv, Embedding
from onnx_lora.points import Array

__all__ = ["ensure_alpha", "lora_config", "lora_tensors", "write_peft"]

T = TypeVar("T")

# PEFT's word for a config whose adapter has whole weights and nothing else.
_NO_TARGETS = "dummy-target-modules"
_PREFIX = "base_model.model."

# The defaults of LoraConfig, for an adapter without factors.
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8


def write_peft(adapter: PortableAdapter, folder: Path) -> None:
    """Write the folder, which must not exist: `adapter_config.json` and `adapter_model.safetensors`.

    Raises UnsupportedAdapterError: what one config of PEFT cannot say.
    """
    problems = [*dora_problems(adapter.deltas), *_whole_weight_problems(adapter)]
    refuse_writing(adapter, "PEFT's LoRA", problems)
    deltas = {module: ensure_alpha(delta) for module, delta in adapter.deltas.items()}
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
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    save_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def _whole_weight_problems(adapter: PortableAdapter) -> list[str]:
    """Whole weights that a PEFT folder cannot hold."""
    problems: list[str] = []
    for name, replacement in adapter.replacements.items():
        if replacement.operation != "set":
            done = "added to" if replacement.operation == "add" else "multiplied with"
            problems.append(f"{name}: is {done} the base's own, and PEFT only replaces; merge it")
    for name, replacement in adapter.replacements.items():
        module = name.rpartition(".")[0]
        if module in adapter.deltas and not replacement.in_place:
            problems.append(f"{name}: its module has factors too, and PEFT keeps one or the other")
    return problems


# --- the config --------------------------------------------------------------------------------


def lora_config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """The fields of `LoraConfig` that say ranks, alphas and targets; names in patterns are anchored and exact."""
    ranks = {module: delta.rank for module, delta in deltas.items()}
    alphas = {module: _choose_alpha(delta) for module, delta in deltas.items()}
    rank = _most_common(ranks, _DEFAULT_RANK)
    alpha = _most_common(alphas, _DEFAULT_ALPHA)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern_of_others(ranks, rank),
        "alpha_pattern": _pattern_of_others(alphas, alpha),
        "target_modules": sorted(deltas) or _NO_TARGETS,
        "use_dora": any(delta.magnitude is not None for delta in deltas.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _most_common(values: Mapping[str, T], default: T) -> T:
    """The value that most modules have; `default` where there is no module."""
    if not values:
        return default
    [(value, _)] = Counter(values.values()).most_common(1)
    return value


def _pattern_of_others(numbers: Mapping[str, float], common: float) -> dict[str, float]:
    """The numbers other than `common`, each by an expression that matches its module alone."""
    return {f"^{re.escape(module)}": number for module, number in numbers.items() if number != common}


def _choose_alpha(delta: Delta) -> float:
    """The alpha for which alpha / r is the scale, or comes nearest to it; an int where it is whole."""
    near = delta.scale * delta.rank
    alpha = near
    for candidate in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if lora_scale(candidate, delta.rank) == delta.scale:
            alpha = candidate
            break
    return int(alpha) if alpha == int(alpha) else alpha


def ensure_alpha(delta: Delta) -> Delta:
    """The delta with a scale that some alpha gives exactly: its own, or else 1, with the old scale in B."""
    scale = lora_scale(_choose_alpha(delta), delta.rank)
    return delta if scale == delta.scale else rescale(delta, 1.0)


# --- the tensors -------------------------------------------------------------------------------


def lora_tensors(deltas: Mapping[str, Delta]) -> dict[str, Array]:
    """PEFT's tensors by PEFT's names, as its checkpoints have them. Shapes as in `Delta`, with axes of size 1 behind
    those of a convolution's B and around those of its magnitude."""
    tensors: dict[str, Array] = {}
    for module, delta in deltas.items():
        kernel = (1,) * (delta.a.ndim - 2)
        if isinstance(delta.kind, Embedding):
            tensors[f"{module}.lora_embedding_A"] = delta.a
            tensors[f"{module}.lora_embedding_B"] = delta.b
        else:
            tensors[f"{module}.lora_A.weight"] = delta.a
            tensors[f"{module}.lora_B.weight"] = delta.b.reshape(*delta.b.shape, *kernel)
        if delta.magnitude is not None:
            shape = (1, -1, *kernel) if isinstance(delta.kind, Conv) else (-1,)
            tensors[f"{module}.lora_magnitude_vector"] = delta.magnitude.reshape(shape)
    return tensors
