"""What in a PEFT config is refused, field by field and method by method, and what to do about it.

The reference is PEFT 0.21: `LoraConfig` and `LoraLayer.resolve_lora_variant`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_lora.adapters.formats.files import shown
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError

__all__ = ["MERGE", "check_method", "refusals"]

# Fields that never change what a trained adapter computes: they steer training, the start of it,
# or are read elsewhere in this file.
_HARMLESS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # A and B are in the same orientation either way
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",  # until PEFT 0.3: whether eval() merges
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",  # judged with its tensors
        "use_rslora",
        "velora_config",  # another backward pass; forward is LoRA's
    }
)

MERGE = "merge it into the base with PEFT (merge_and_unload) and export that"
_RETRAIN = "train without it"

# Fields that change what an adapter computes, and are refused unless empty: what it is, and the cure.
_REFUSED = {
    "alora_invocation_tokens": ("aLoRA: acts only behind certain tokens", _RETRAIN),
    "arrow_config": ("Arrow: routes every token among adapters", "convert the adapters it routes among, one by one"),
    "enable_lora": ("MergedLinear of PEFT before 0.4: a grouped B", "train again with a current PEFT"),
    "ensure_weight_tying": ("tied layers share one adapter", _RETRAIN),
    "kasa_config": ("KaSA: changes the base's weights", MERGE),
    "layer_replication": ("the base's layers are repeated", "export the enlarged model and give it the adapter"),
    "lora_bias": ("a bias on B", MERGE),
    "megatron_config": ("Megatron's parallel layers", MERGE),
    "monteclora_config": ("MonteCLoRA: samples its weights", _RETRAIN),
    "target_parameters": ("LoRA on bare parameters", MERGE),
    "trainable_token_indices": ("single rows of the embedding are trained", MERGE),
    "use_bdlora": ("BD-LoRA: block-diagonal factors", MERGE),
    "use_qalora": ("QALoRA: pools the inputs", MERGE),
}

# `init_lora_weights` that leave the base alone; with all others the base was changed before training.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_CONVERT = (
    "save it again from where it was trained with `save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)`, which makes it a plain LoRA"
)

# Other methods of PEFT by what could be done with an adapter of theirs, where merging it is not the only cure.
_OTHER_METHODS = (
    (
        f"convert it to LoRA with PEFT (`peft.convert_to_lora`), or {MERGE}",
        ("HIRA", "LOHA", "LOKR"),
    ),
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
)


def _not_peft(config: Mapping[str, Any]) -> str:
    if "fine_tune_type" in config or "lora_parameters" in config:
        found = "this is MLX's"
    elif "config" in config or "model_class" in config:
        found = "this looks like AdapterHub's"
    else:
        found = f"this one holds {', '.join(sorted(map(str, config))[:8]) or 'nothing'}"
    return f"must hold peft_type, as PEFT writes it, and {found}; convert the adapter to PEFT's format"


def check_method(config: Mapping[str, Any], path: Path) -> None:
    """Raises AdapterFileError: no config of PEFT. UnsupportedAdapterError: another method than LoRA."""
    if "peft_type" not in config:
        raise AdapterFileError(_not_peft(config), path=path)
    method = config["peft_type"]
    if method == "LORA":
        return
    cure = next((cure for cure, methods in _OTHER_METHODS if method in methods), MERGE)
    raise UnsupportedAdapterError(f"peft_type must be LORA, and is {shown(method)}: {cure}", path=path)


def refusals(config: Mapping[str, Any]) -> list[str]:
    """Every field of a LoRA config that says what cannot be applied exactly."""
    problems = [f"{key}: {what}; {cure}" for key, (what, cure) in _REFUSED.items() if config.get(key)]
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
        problems.append(f"init_lora_weights {init!r}: the base's weights were changed before training; {_CONVERT}")
    unknown = sorted(key for key, value in config.items() if value and key not in _HARMLESS and key not in _REFUSED)
    problems.extend(
        f"{key}: not known here, and may change what the adapter computes; upgrade onnx-lora, or remove it "
        "from the config if it only concerns training"
        for key in unknown
    )
    return problems
