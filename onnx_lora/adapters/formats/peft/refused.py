"""What in a PEFT config is refused, field by field and method by method, and what to do about it.

What a method refuses of its own fields stands in its file. The reference is PEFT 0.21: `PeftConfig`, `PeftType`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnx_lora.adapters.methods.method import MERGE, Method, Refusal
from onnx_lora.adapters.plugins import Plugins
from onnx_lora.adapters.problems import abbreviate
from onnx_lora.errors import AdapterFileError, PluginError, UnsupportedAdapterError

__all__ = ["NEEDS_INITIAL", "NOT_READ", "check_method", "list_refused", "refusals"]

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
        # ms-swift's: the type that the factors were trained in, and LoRA+'s learning rates.
        "lora_dtype",
        "lorap_emb_lr",
        "lorap_lr_ratio",
    }
)

# Of what wrote the config: `trainer_version`, `transformers_version`. As a text of numbers it switches nothing.
_VERSION_FIELD = re.compile(r"\w+_version")
_VERSION = re.compile(r"\d+\.\d[0-9A-Za-z.+-]*")

# `init_lora_weights` that leave the base alone; with all others the base was changed before training.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

# Those that took `scale · B0 · A0` out of the base, the adapter as it was at the start.
_TOOK_INITIAL_OUT = ("pissa", "olora", "corda", "lora_ga")

NEEDS_INITIAL = (
    "give the initial adapter, saved before training, with `initial` (of read_adapter, and of `onnx-lora convert`); or "
    "save this one again from where it was trained with `save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)`, which makes it a plain LoRA"
)

_PROMPT = Refusal("it changes the prompt, not the weights", "train a LoRA instead")
_ROUTER = Refusal("it routes among adapters", "convert those one by one")
_BY_INPUT = Refusal("it computes another thing for every input, which no weight does", "train a LoRA instead")

# Methods of PEFT that are not read, and why. An adapter of any other method that is not read can be merged by PEFT.
NOT_READ: Mapping[str, Refusal] = {
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "XLORA": _ROUTER,
    "POLY": _ROUTER,
    "LILY": _BY_INPUT,
    "PEANUT": _BY_INPUT,
}

_MOST_FIELDS = 8  # of a foreign config, in a message


def list_refused(methods: Iterable[Method]) -> dict[Refusal, list[str]]:
    """Every reason for which something of PEFT's is refused, with the names that it is of: methods that are not read,
    and fields that `methods` refuse. The table of docs/adapters.md is made of it."""
    names: dict[Refusal, list[str]] = {}
    for peft_type, refusal in NOT_READ.items():
        names.setdefault(refusal, []).append(peft_type)
    for method in methods:
        for field, refusal in method.refused.items():
            of_reason = names.setdefault(refusal, [])
            if field not in of_reason:
                of_reason.append(field)
    return names


def _explain_foreign(config: Mapping[str, Any]) -> str:
    """Whose config it is, where it is not PEFT's."""
    if "fine_tune_type" in config or "lora_parameters" in config:
        return (
            "must hold peft_type, as PEFT writes it, and this is MLX's; give the folder with adapters.safetensors too"
        )
    if "config" in config or "model_class" in config:
        found = "this looks like AdapterHub's"
    else:
        fields = sorted(str(field) for field in config)
        found = f"this one holds {', '.join(fields[:_MOST_FIELDS]) or 'nothing'}"
    return f"must hold peft_type, as PEFT writes it, and {found}; convert the adapter to PEFT's format"


def check_method(config: Mapping[str, Any], known: Plugins[Method], path: Path) -> Method:
    """The method that a config names.

    Raises AdapterFileError: no config of PEFT. UnsupportedAdapterError: a method that is not read. PluginError: another
    distribution brings the method, and is broken.
    """
    if "peft_type" not in config:
        raise AdapterFileError(_explain_foreign(config), path=path)
    method = config["peft_type"]
    if isinstance(method, str) and method in known:
        found = known[method]
        if found.peft_type != method:
            raise PluginError(
                f"the method {method!r} of another package must have that peft_type, and has "
                f"{abbreviate(found.peft_type)}; correct the package"
            )
        return found
    cure = MERGE
    if isinstance(method, str) and method in NOT_READ:
        refusal = NOT_READ[method]
        cure = f"{refusal.reason}; {refusal.cure}"
    raise UnsupportedAdapterError(
        f"peft_type must be one of {', '.join(known)}, and is {abbreviate(method)}: {cure}",
        path=path,
        problems=known.refused,
    )


def refusals(config: Mapping[str, Any], method: Method, *, with_initial: bool) -> list[str]:
    """Every field of a config that says what cannot be applied exactly. `with_initial`: the adapter as it was before
    its training is there too."""
    problems: list[str] = []
    for key, refusal in method.refused.items():
        if config.get(key):
            problems.append(f"{key}: {refusal.reason}; {refusal.cure}")
    problems.extend(_init_problems(config.get("init_lora_weights"), with_initial=with_initial))
    known = _HARMLESS | method.fields | set(method.refused)
    for key in sorted(config):
        if config[key] and key not in known and not _is_version(key, config[key]):
            problems.append(
                f"{key}: not known here, and may change what the adapter computes; upgrade onnx-lora, or remove it "
                "from the config if it only concerns training"
            )
    return problems


def _is_version(key: str, value: object) -> bool:
    """Whether a field says which version of a program wrote the config."""
    has_name = _VERSION_FIELD.fullmatch(key) is not None
    return has_name and isinstance(value, str) and _VERSION.fullmatch(value) is not None


def _init_problems(init: object, *, with_initial: bool) -> list[str]:
    """Of `init_lora_weights`: whether it changed the base, and what can be done about it."""
    name = init.lower() if isinstance(init, str) else init
    if name in _HARMLESS_INITS:
        return []
    is_restored = isinstance(name, str) and name.startswith(_TOOK_INITIAL_OUT)
    if is_restored and with_initial:
        return []
    cure = NEEDS_INITIAL if is_restored else MERGE
    return [f"init_lora_weights {abbreviate(name)}: the base's weights were changed before training; {cure}"]
