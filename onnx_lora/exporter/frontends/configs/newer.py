"""Checkpoints that a newer transformers wrote, in the words of the installed one: it translates configs, or refuses
them, and reads no weight."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onnx_lora.errors import ModelError
from onnx_lora.exporter.frontends.configs.rope import RopeError, rope_fields
from onnx_lora.json_file import read_json

__all__ = ["copy_or_link", "is_newer", "open_readable", "translate_config"]

_CONFIG = "config.json"

# Larger files are linked, not copied, beside a translated config: weights are, tokenizers are not.
_LINKED = 64 * 2**20  # bytes

# What a hub repository may hold beside the weights that PyTorch reads.
_NOT_READ = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite")

# Fields of transformers 5 that older classes lack, and that change no number of an evaluation: of training, of how a
# layer is computed, of the file itself. Found by comparing the configs of all 396 model types that 4.57 and 5.24 share.
_NEUTRAL = frozenset(
    [
        *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype"),
        *("quantization_config", "transformers_version", "unsloth_fixed", "unsloth_version"),
        *("attn_implementation", "experts_implementation", "use_cache"),
        *("use_associative_scan", "use_mamba_kernels", "use_mambapy"),
        *("initializer_factor", "initializer_range", "output_router_logits", "router_aux_loss_coef"),
        *("label_names", "num_classes", "num_nextn_predict_layers", "pretraining_tp", "_pad_token_id", "vocab_size"),
        *("out_features", "out_indices", "stage_names"),
    ]
)

# Fields that say what the older code does anyway, with the value of which that is true.
_AS_BEFORE: Mapping[str, object] = {
    "apply_layernorm": True,
    "convolution_bias": True,
    "reshape_hidden_states": True,
    "rope_theta": 10000.0,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "time_step_limit": [0.0, math.inf],
    "use_bidirectional_attention": False,
}

# How modelling code reads a field, be it declared by the config's class or not.
_READ = re.compile(r"""\bconfig\.(\w+)|\bconfig, ["'](\w+)["']""")

# New names of old fields: T5's output is scaled where the older class was told that embeddings are tied.
_RENAMED = {"num_local_experts": "num_experts", "scale_decoder_outputs": "tie_word_embeddings"}


@contextlib.contextmanager
def open_readable(
    model: str | os.PathLike[str], fields: Mapping[str, Any] | None = None
) -> Iterator[str | os.PathLike[str]]:
    """What to read in place of a folder or a hub id: itself, or a folder of the same files with translated configs,
    for as long as the block runs. `fields`: what its config.json says, where it was read already; of a hub id it must
    have been.

    Raises ModelError: a config says what the installed transformers does not understand, or is no JSON.
    """
    root = Path(model)
    if not root.is_dir():
        written = dict(fields or {})
        if not is_newer(_version(written)) and translate_config(written, model) == written:
            yield model
            return
        root, fields = _snapshot(model), None
    changed = _changed_configs(root, fields)
    if not changed:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="onnx_lora.") as scratch:
        folder = Path(scratch) / root.resolve().name
        shutil.copytree(root, folder, copy_function=copy_or_link)
        for name, config in changed.items():
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(config, indent=2), "utf-8")
        yield folder


def _changed_configs(root: Path, fields: Mapping[str, Any] | None) -> dict[Path, dict[str, Any]]:
    """The configs of a folder that the installed transformers must be told otherwise, by their place in it; a
    pipeline's networks have their own. `fields`: those of the folder itself, where they were read already."""
    changed: dict[Path, dict[str, Any]] = {}
    for file in sorted([*root.glob(_CONFIG), *root.glob(f"*/{_CONFIG}")]):
        if fields is not None and file.parent == root:
            written = dict(fields)
        else:
            written = read_json(file, ModelError)
        translated = translate_config(written, file)
        if translated != written:
            changed[file.relative_to(root)] = translated
    return changed


def translate_config(config: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """A config's dictionary as the installed transformers must be told to compute the same. `path` is for messages.

    Raises ModelError: it says what the installed transformers does not understand.
    """
    import transformers

    written = _version(config)
    problems: list[str] = []
    translated = _translate(dict(config), _class_of(config, None), is_newer(written), "", problems)
    if problems:
        raise ModelError(
            f"was saved by {f'transformers {written}' if written else 'a newer transformers'}, and the installed "
            f"{transformers.__version__} would misread it; save it again with transformers {transformers.__version__}, "
            "or remove the fields that are no part of the model",
            path=path,
            problems=problems,
        )
    return translated


def is_newer(version: str) -> bool:
    """Whether a version of transformers is of a newer major one than the installed."""
    import transformers

    return _major(version) > _major(transformers.__version__)


def _version(config: Mapping[str, Any]) -> str:
    return str(config.get("transformers_version") or "")


def _translate(
    config: dict[str, Any], kind: type[Any] | None, newer: bool, where: str, problems: list[str]
) -> dict[str, Any]:
    """One level of a config, and those below it. `kind`: the installed class of it, or None for one that it lacks.
    `where`: the names of the levels above, each with a dot. What cannot be translated is added to `problems`."""
    if kind is None:
        return config  # whoever loads it says that it knows no such model
    config = {name: _decode(value) for name, value in config.items()}
    known = _fields_of(kind)
    translated = _translate_parts(config, kind, newer, where, problems)
    rope = config.get("rope_parameters")
    if rope is not None and not isinstance(rope, dict):
        problems.append(f"{where}rope_parameters: must be an object, and is {rope!r}")
    elif rope is not None and "rope_parameters" not in known:
        try:
            translated |= rope_fields(config, known)
        except RopeError as error:
            problems.append(f"{where}rope_parameters: {error}")
    if not newer:
        return translated
    for name, old in _RENAMED.items():
        if name in config and name not in known and old in known:
            translated[old] = translated.pop(name)
    for name, value in config.items():
        if name not in known and name in translated and not _is_harmless(name, value, config):
            problems.append(
                f"{where}{name}: has the value {value!r}, and the older {kind.__name__} knows no such field"
            )
    return translated


def _translate_parts(
    config: Mapping[str, Any], kind: type[Any], newer: bool, where: str, problems: list[str]
) -> dict[str, Any]:
    """A config whose inner configs (a text model's, a vision model's) are translated, and the rest as it was."""
    parts = getattr(kind, "sub_configs", {})
    if not isinstance(parts, dict):
        parts = {}
    translated: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and ("model_type" in value or name in parts):
            inner = _class_of(value, parts.get(name))
            translated[name] = _translate(value, inner, newer, f"{where}{name}.", problems)
        else:
            translated[name] = value
    return translated


def _is_harmless(name: str, value: object, config: Mapping[str, Any]) -> bool:
    """Whether a field that the older class lacks can be left out: it changes nothing, or says what holds anyway."""
    if value is None or name in _NEUTRAL or name == "rope_parameters":
        return True
    if name == "layer_types":
        return _are_default_layers(value, config)
    return name in _AS_BEFORE and value == _AS_BEFORE[name]


def _are_default_layers(types: object, config: Mapping[str, Any]) -> bool:
    """Whether every layer attends to everything; ModernBERT's, to everything in the first of three."""
    if not isinstance(types, list):
        return False
    every = 3 if config.get("model_type") in ("modernbert", "modernbert-decoder") else 1
    names = ("full_attention", "sliding_attention")
    return all(name == names[index % every != 0] for index, name in enumerate(types))


def _decode(value: object) -> object:
    """Infinity, which transformers 5 writes as an object."""
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return value


def _major(version: str) -> int:
    found = re.match(r"\d{1,4}", version)
    return int(found[0]) if found else 0


def _class_of(config: Mapping[str, Any], declared: Any) -> type[Any] | None:
    """The installed class of a config by the type it names, or the one that the config around it declares."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = config.get("model_type")
    if isinstance(name, str) and name in CONFIG_MAPPING:
        found: type[Any] = CONFIG_MAPPING[name]
        return found
    return declared if isinstance(declared, type) and not issubclass(declared, AutoConfig) else None


def _fields_of(kind: type[Any]) -> dict[str, object]:
    """Every name that a config class or the model's code understands, with its default where the class takes one. No
    config is made: of some classes the default would be looked for on the hub."""
    from transformers import PretrainedConfig

    names: dict[str, object] = dict.fromkeys(vars(PretrainedConfig()))
    for ancestor in reversed(kind.__mro__):
        names |= dict.fromkeys(vars(ancestor))
        constructor = getattr(vars(ancestor).get("__init__"), "__code__", None)
        if constructor is not None:
            # The attributes that a constructor sets are among the names of its code.
            names |= dict.fromkeys(constructor.co_names)
    for file in Path(inspect.getfile(kind)).parent.glob("modeling_*.py"):
        for read in _READ.findall(file.read_text("utf-8")):
            names |= dict.fromkeys(read)
    names |= dict.fromkeys(getattr(kind, "attribute_map", {}))
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        names[name] = parameter.default
    return names


def _snapshot(model: str | os.PathLike[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(model), ignore_patterns=list(_NOT_READ)))


def copy_or_link(source: str, target: str) -> str:
    """Give a folder a file of another, the large ones without copying them: as `shutil.copytree` calls it."""
    real = Path(source).resolve()
    if real.stat().st_size > _LINKED:
        Path(target).symlink_to(real)
    else:
        shutil.copyfile(real, target)
    return target
