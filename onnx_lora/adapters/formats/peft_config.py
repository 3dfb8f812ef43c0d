"""PEFT's `adapter_config.json`: which modules it selects, with what rank and scale, and what in it is
refused. It knows no tensor. The reference is PEFT 0.21: `LoraConfig`, `check_target_module_exists`,
`get_pattern_key` and `LoraLayer.update_layer`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lora.adapters.formats.files import opened, parse_json
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError

__all__ = ["CONFIG", "LoraRules", "read_config"]

CONFIG = "adapter_config.json"

# With every module of a large model named in its patterns a config has a few hundred kB.
_CONFIG_LIMIT = 16 * 2**20  # bytes

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
        "use_rslora",
        "velora_config",  # another backward pass; forward is LoRA's
    }
)

_MERGE = "merge it into the base with PEFT (merge_and_unload) and export that"
_RETRAIN = "train without it"

# Fields that change what an adapter computes, and are refused unless empty: what it is, and the cure.
_REFUSED = {
    "alora_invocation_tokens": ("aLoRA: acts only behind certain tokens", _RETRAIN),
    "arrow_config": ("Arrow: routes every token among adapters", "convert the adapters it routes among, one by one"),
    "enable_lora": ("MergedLinear of PEFT before 0.4: a grouped B", "train again with a current PEFT"),
    "ensure_weight_tying": ("tied layers share one adapter", _RETRAIN),
    "kasa_config": ("KaSA: changes the base's weights", _MERGE),
    "layer_replication": ("the base's layers are repeated", "export the enlarged model and give it the adapter"),
    "lora_bias": ("a bias on B", _MERGE),
    "megatron_config": ("Megatron's parallel layers", _MERGE),
    "monteclora_config": ("MonteCLoRA: samples its weights", _RETRAIN),
    "target_parameters": ("LoRA on bare parameters", _MERGE),
    "trainable_token_indices": ("single rows of the embedding are trained", _MERGE),
    "use_bdlora": ("BD-LoRA: block-diagonal factors", _MERGE),
    "use_dora": ("DoRA: a magnitude for every output", _MERGE),
    "use_qalora": ("QALoRA: pools the inputs", _MERGE),
}

# `init_lora_weights` that leave the base alone; with all others the base was changed before training.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_CONVERT = (
    "save it again from where it was trained with `save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)`, which makes it a plain LoRA"
)

# Other methods of PEFT, and how they could be had.
_OTHER_METHODS = {
    "ADALORA": "convert it to LoRA with PEFT (`peft.convert_to_lora`)",
    "IA3": _MERGE,
    "LOHA": "convert it to LoRA with PEFT (`peft.convert_to_lora`), or " + _MERGE,
    "LOKR": "convert it to LoRA with PEFT (`peft.convert_to_lora`), or " + _MERGE,
    "VERA": _MERGE,
    "VBLORA": _MERGE,
    "OFT": _MERGE,
    "BOFT": _MERGE,
    "PREFIX_TUNING": "it changes the prompt, not the weights; train a LoRA instead",
    "PROMPT_TUNING": "it changes the prompt, not the weights; train a LoRA instead",
    "P_TUNING": "it changes the prompt, not the weights; train a LoRA instead",
}

# peft_model.py: the heads that a task adds to modules_to_save.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# How PEFT wraps the expressions of rank_pattern and alpha_pattern, modules_to_save, layers_pattern.
_AT_END = r"(.*\.)?({})$"
_AROUND = r"(^|.*\.){}($|\..*)"
_AT_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."


@dataclass(frozen=True)
class LoraRules:
    """A LoRA config that was checked: what it says of every module."""

    method: str
    base_model: str
    rank: int
    alpha: float
    rslora: bool
    bias: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target: str | Sequence[str] | None
    exclude: str | Sequence[str]
    saved: tuple[str, ...]  # modules_to_save
    task_heads: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha/r, or alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023): the only place where it is computed."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def rejects(self, module: str) -> str | None:
        """Why PEFT would put no LoRA on `module`, or None."""
        if isinstance(self.exclude, str):
            excluded = bool(self.exclude) and re.fullmatch(self.exclude, module) is not None
        else:
            excluded = _ends_with_one(module, self.exclude)
        if excluded:
            return "exclude_modules excludes it"
        if any(re.match(_AROUND.replace("{}", name), module) for name in self.saved):
            return "modules_to_save covers it"
        if self.target is None:
            return "target_modules is null, and PEFT then chooses by the kind of model"
        if isinstance(self.target, str):
            chosen = self.target.lower() == "all-linear" or re.fullmatch(self.target, module) is not None
        else:
            chosen = module in self.target or (_ends_with_one(module, self.target) and self._layer_chosen(module))
        return None if chosen else "target_modules (with layers_to_transform) does not choose it"

    def _layer_chosen(self, module: str) -> bool:
        if not self.layers:
            return True
        patterns = [_AT_LAYER.replace("{}", pattern) for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            found = re.match(pattern, module)
            if found:
                return int(found["idx"]) in self.layers
        return False


def _ends_with_one(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_key(patterns: Mapping[str, object], module: str) -> str:
    """PEFT's `get_pattern_key`: anchored at the end of the module's name, first match wins."""
    return next((key for key in patterns if re.match(_AT_END.replace("{}", key), module)), module)


def read_config(path: Path) -> LoraRules:
    """Read and check `adapter_config.json`.

    Raises AdapterFileError: damaged, or not PEFT's. UnsupportedAdapterError: PEFT's, and refused,
    every reason named.
    """
    with opened(path) as file:
        text = file.read(_CONFIG_LIMIT + 1)
    if len(text) > _CONFIG_LIMIT:
        raise AdapterFileError(f"too large for a config of PEFT (limit {_CONFIG_LIMIT} bytes)", path=path)
    config = parse_json(text, path, what="a config")
    if "peft_type" not in config:
        raise AdapterFileError(_not_peft(config), path=path)
    _check_method(config, path)
    if problems := _unsupported(config):
        raise UnsupportedAdapterError("says what cannot be applied exactly", path=path, problems=problems)
    reader = _Reader(config)
    rules = reader.rules()
    if reader.problems:
        raise AdapterFileError("is no config that PEFT would load", path=path, problems=reader.problems)
    return rules


def _not_peft(config: Mapping[str, Any]) -> str:
    if "fine_tune_type" in config or "lora_parameters" in config:
        found = "this is MLX's"
    elif "config" in config or "model_class" in config:
        found = "this looks like AdapterHub's"
    else:
        found = f"this one holds {', '.join(sorted(map(str, config))[:8]) or 'nothing'}"
    return f"must hold peft_type, as PEFT writes it, and {found}; convert the adapter to PEFT's format"


def _check_method(config: Mapping[str, Any], path: Path) -> None:
    method = config["peft_type"]
    if method == "LORA":
        return
    cure = _OTHER_METHODS.get(method) if isinstance(method, str) else None
    raise UnsupportedAdapterError(f"peft_type must be LORA, and is {method!r}; {cure or _MERGE}", path=path)


def _unsupported(config: Mapping[str, Any]) -> list[str]:
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


class _Reader:
    """Takes fields out of a config and collects what is wrong with them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []

    def rules(self) -> LoraRules:
        target = self.names("target_modules") if self.config.get("target_modules") is not None else None
        exclude = self.names("exclude_modules")
        for key, value in (("target_modules", target), ("exclude_modules", exclude)):
            if isinstance(value, str):
                self.check_expressions(key, "{}", [value])
        layers, pattern = self.layers(), self.name_list("layers_pattern", _AT_LAYER, one=True)
        if isinstance(target, str) and self.config.get("layers_to_transform") is not None:
            self.problems.append("layers_to_transform cannot go with a target_modules that is one string")
        if pattern and layers is None:
            self.problems.append("layers_pattern needs layers_to_transform")
        rslora, task = bool(self.config.get("use_rslora")), self.config.get("task_type")
        return LoraRules(
            method="rsLoRA" if rslora else "LoRA",
            base_model=str(self.config.get("base_model_name_or_path") or ""),
            rank=self.rank("r", self.config.get("r")),
            alpha=self.number("lora_alpha", self.config.get("lora_alpha")),
            rslora=rslora,
            bias=self.bias(),
            rank_pattern={key: self.rank(f"rank_pattern[{key!r}]", v) for key, v in self.table("rank_pattern")},
            alpha_pattern={key: self.number(f"alpha_pattern[{key!r}]", v) for key, v in self.table("alpha_pattern")},
            target=target,
            exclude=exclude,
            saved=self.name_list("modules_to_save", _AROUND),
            task_heads=_TASK_HEADS.get(task, ()) if isinstance(task, str) else (),
            layers=layers,
            layers_pattern=pattern,
        )

    def rank(self, key: str, value: object) -> int:
        if type(value) is int and value > 0:
            return value
        self.problems.append(f"{key} must be a rank of at least 1, and is {_shown(value)}")
        return 1

    def number(self, key: str, value: object) -> float:
        # No default for a missing alpha: PEFT's own was none once, and is 8 now.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        self.problems.append(f"{key} must be a finite number, and is {_shown(value)}")
        return 0.0

    def bias(self) -> str:
        value = self.config.get("bias") or "none"
        if value not in ("none", "all", "lora_only"):
            self.problems.append(f"bias must be none, all or lora_only, and is {_shown(value)}")
        return str(value)

    def table(self, key: str) -> list[tuple[str, object]]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            self.problems.append(f"{key} must map module names to numbers, and is {_shown(value)}")
            return []
        self.check_expressions(key, _AT_END, list(value))
        return list(value.items())

    def names(self, key: str) -> str | tuple[str, ...]:
        """A regular expression, or a list of names."""
        value = self.config.get(key)
        if isinstance(value, str):
            return value
        if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return tuple(value or ())
        self.problems.append(f"{key} must be a list of module names or one string, and is {_shown(value)}")
        return ()

    def name_list(self, key: str, wrapper: str, *, one: bool = False) -> tuple[str, ...]:
        """A list of regular expressions; with `one` a single string is a list of one."""
        value = self.names(key)
        if isinstance(value, str):
            if not one:
                self.problems.append(f"{key} must be a list of module names, and is {_shown(value)}")
                return ()
            value = (value,) if value else ()
        self.check_expressions(key, wrapper, value)
        return value

    def layers(self) -> tuple[int, ...] | None:
        value = self.config.get("layers_to_transform")
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if all(type(layer) is int for layer in layers):
            return tuple(layers)
        self.problems.append(f"layers_to_transform must be layer numbers, and is {_shown(value)}")
        return None

    def check_expressions(self, key: str, wrapper: str, patterns: Sequence[str]) -> None:
        for pattern in patterns:
            try:
                re.compile(wrapper.replace("{}", pattern))
            except (re.error, RecursionError, OverflowError) as error:
                self.problems.append(f"{key}: {_shown(pattern)} is no regular expression: {error}")


def _shown(value: object) -> str:
    return repr(value)[:80]
