"""What in a PEFT config is refused, field by field and method by method, and what to do about it.

The reference is PEFT 0.21: `LoraConfig`, `LoraLayer.resolve_lora_variant`, `PeftType`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_lora.adapters.formats.files.reading import shown
from onnx_lora.adapters.formats.peft.method import Method
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError

__all__ = ["LORA_REFUSED", "MERGE", "NEEDS_INITIAL", "check_method", "refusals"]

MERGE = "merge it into the base with PEFT (merge_and_unload) and export that"
_RETRAIN = "train without it"

# Fields of every method that never change what a trained adapter computes: they steer training, the start of it, or
# are read for all methods alike.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",  # only how the base stores its weight: every method's tensors are for `[out, in]`
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)

# Fields of LoRA that change what it computes, and are refused unless empty: what it is, and the cure.
LORA_REFUSED = {
    "alora_invocation_tokens": ("aLoRA: acts only behind certain tokens", _RETRAIN),
    "arrow_config": ("Arrow: routes every token among adapters", "convert the adapters it routes among, one by one"),
    "kasa_config": ("KaSA: changes the base's weights", MERGE),
    "layer_replication": ("the base's layers are repeated", "export the enlarged model and give it the adapter"),
    "megatron_config": ("Megatron's parallel layers", MERGE),
    "monteclora_config": ("MonteCLoRA: samples its weights", _RETRAIN),
}

# `init_lora_weights` that leave the base alone; with all others the base was changed before training.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

# Those that took `scale · B0 · A0` out of the base, the adapter as it was at the start.
_TOOK_INITIAL_OUT = ("pissa", "olora", "corda", "lora_ga")

NEEDS_INITIAL = (
    "give the initial adapter, saved before training, with `initial` (of read_adapter, and of `onnx-lora convert`); or "
    "save this one again from where it was trained with `save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)`, which makes it a plain LoRA"
)

# Methods of PEFT that are not read, by what could be done with an adapter of theirs, where merging it is not the cure.
_OTHER_METHODS = (
    (
        "it changes the prompt, not the weights; train a LoRA instead",
        (
            "ADAPTION_PROMPT",
            "CARTRIDGE",
            "CPT",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "PROMPT_TUNING",
        ),
    ),
    ("it routes among adapters; convert those one by one", ("POLY", "XLORA")),
    ("it computes another thing for every input, which no weight does; train a LoRA instead", ("LILY", "PEANUT")),
)


def _not_peft(config: Mapping[str, Any]) -> str:
    if "fine_tune_type" in config or "lora_parameters" in config:
        return (
            "must hold peft_type, as PEFT writes it, and this is MLX's; give the folder with adapters.safetensors too"
        )
    elif "config" in config or "model_class" in config:
        found = "this looks like AdapterHub's"
    else:
        found = f"this one holds {', '.join(sorted(map(str, config))[:8]) or 'nothing'}"
    return f"must hold peft_type, as PEFT writes it, and {found}; convert the adapter to PEFT's format"


def check_method(config: Mapping[str, Any], known: Mapping[str, Method], path: Path) -> Method:
    """Raises AdapterFileError: no config of PEFT. UnsupportedAdapterError: a method that is not read."""
    if "peft_type" not in config:
        raise AdapterFileError(_not_peft(config), path=path)
    method = config["peft_type"]
    if isinstance(method, str) and method in known:
        return known[method]
    cure = next((cure for cure, methods in _OTHER_METHODS if method in methods), MERGE)
    raise UnsupportedAdapterError(
        f"peft_type must be one of {', '.join(known)}, and is {shown(method)}: {cure}", path=path
    )


def refusals(config: Mapping[str, Any], method: Method, *, with_initial: bool) -> list[str]:
    """Every field of a config that says what cannot be applied exactly."""
    problems = [f"{key}: {what}; {cure}" for key, (what, cure) in method.refused.items() if config.get(key)]
    init = config.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else init
    if init not in _HARMLESS_INITS:
        restored = isinstance(init, str) and init.startswith(_TOOK_INITIAL_OUT)
        cure = NEEDS_INITIAL if restored else MERGE
        if not (restored and with_initial):
            problems.append(f"init_lora_weights {shown(init)}: the base's weights were changed before training; {cure}")
    known = _HARMLESS | method.harmless | set(method.refused)
    problems.extend(
        f"{key}: not known here, and may change what the adapter computes; upgrade onnx-lora, or remove it "
        "from the config if it only concerns training"
        for key in sorted(key for key, value in config.items() if value and key not in known)
    )
    return problems
