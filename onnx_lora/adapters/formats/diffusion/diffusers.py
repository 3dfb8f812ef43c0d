"""Diffusers' LoRA files: which tensor of which module each name means, in all spellings since the first, and what
scale is meant.

The reference is diffusers 0.35: `loaders/lora_base.py`, `utils/state_dict_utils.py`, `utils/peft_utils.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx_lora.adapters.adapter import Adapter
from onnx_lora.adapters.formats.collected import Collected, alpha_of, two_factors
from onnx_lora.adapters.formats.files.reading import TensorFile, parse_json
from onnx_lora.adapters.formats.peft.config import parse_config
from onnx_lora.adapters.formats.peft.methods import METHODS
from onnx_lora.adapters.formats.peft.sorter import Sorter
from onnx_lora.points import Array

__all__ = ["COMPONENTS", "FILE", "METADATA", "PICKLE", "is_diffusers", "read_diffusers"]

FILE = "pytorch_lora_weights.safetensors"
PICKLE = "pytorch_lora_weights.bin"

# Of the header: the PEFT configs of all parts in one JSON object, their fields behind the part's name.
METADATA = "lora_adapter_metadata"

# The parts of a pipeline that adapters are for. A file may also be of one part, and name none.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "prior")

# Ends of names, by what they are in PEFT's words; the first that matches counts. `processor` stands where attention
# had its factors apart from the modules.
_TENSORS = (
    (re.compile(r"\.lora_A\.weight$"), "lora_A"),
    (re.compile(r"\.lora_B\.weight$"), "lora_B"),
    (re.compile(r"\.lora_B\.bias$"), "lora_B.bias"),
    (re.compile(r"\.lora_magnitude_vector(\.weight)?$"), "lora_magnitude_vector"),
    (re.compile(r"(\.lora|\.lora_linear_layer|(?<=\.to_[qkv])_lora|(?<=\.to_out)_lora)\.down\.weight$"), "lora_A"),
    (re.compile(r"(\.lora|\.lora_linear_layer|(?<=\.to_[qkv])_lora|(?<=\.to_out)_lora)\.up\.weight$"), "lora_B"),
    (re.compile(r"\.alpha$"), "alpha"),
)

# Modules by what the oldest names call them, of text encoders and of UNets.
_OLD_TEXT = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}
_OLD_UNET = {".to_out": ".to_out.0"}


@dataclass
class _Part:
    """A part of a pipeline; `modules`: their tensors, by PEFT's names."""

    modules: dict[str, dict[str, Array]] = field(default_factory=dict)


def is_diffusers(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file is diffusers'. PEFT's spelling counts only behind a part's name, or with diffusers' metadata: else
    it is half of a PEFT folder, and its scale is in the other half."""
    return METADATA in metadata or any(_is_own(name) for name in names)


def _is_own(name: str) -> bool:
    kind = next((kind for pattern, kind in _TENSORS if pattern.search(name)), "alpha")
    if kind == "alpha" or name.startswith("base_model."):
        return False
    if ".lora_A." not in name and ".lora_B." not in name and ".lora_magnitude_vector" not in name:
        return True
    part = name.partition(".")[0]
    # GPT-2's modules begin with `transformer` too.
    return part in COMPONENTS and (part != "transformer" or "transformer_blocks." in name)


def read_diffusers(file: TensorFile, path: Path, name: str) -> Adapter:
    """Raises AdapterFileError: damaged, or a scale that is not told. UnsupportedAdapterError: what is refused."""
    collected = Collected()
    parts: dict[str, _Part] = {}
    for key, values in file.tensors.items():
        found = _parsed(key)
        if found is None:
            collected.unsupported.append(f"{key}: is no tensor of LoRA known here; upgrade onnx-lora")
            continue
        component, module, tensor = found
        own = parts.setdefault(component, _Part()).modules.setdefault(module, {})
        if tensor in own:
            collected.problems.append(f"{key}: there are two tensors for {tensor} of {module}")
        own[tensor] = values
    configs = _configs(file.metadata, path)
    for component, part in parts.items():
        if configs and not component and not configs.get(""):
            # Of a part that is named diffusers takes the alpha for the rank; here it would not find the config.
            collected.problems.append(
                f"the header has configs of {', '.join(configs)}, and the tensors' names no part; put it in front"
            )
        elif component in configs:
            _take_with_config(collected, component, part, configs[component], path)
        else:
            _take_alone(collected, component, part)
    return collected.adapter(path, name, format="diffusers", sha256=file.sha256)


def _parsed(key: str) -> tuple[str, str, str] | None:
    """Component, module in it, tensor."""
    first, _, rest = key.partition(".")
    component, name = (first, rest) if first in COMPONENTS and rest else ("", key)
    for pattern, tensor in _TENSORS:
        found = pattern.search(f".{name}")
        if not found:
            continue
        module = f".{name}"[: found.start()].replace(".processor.", ".")
        if found[0].startswith("_lora") or (tensor == "lora_magnitude_vector" and ".to_" in module):
            text = component.startswith("text_encoder") or ".self_attn." in module
            for old, new in (_OLD_TEXT if text else _OLD_UNET).items():
                module = module.removesuffix(old) + new if module.endswith(old) else module
        return (component, module.removeprefix("."), tensor) if len(module) > 1 else None
    return None


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """The PEFT config of each part that the header has one of; a network saved alone has one without a part's name."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in parse_json(metadata.get(METADATA, "{}").encode(), path, what=METADATA).items():
        component, dot, own = key.partition(".")
        part, name = (component, own) if dot and component in COMPONENTS else ("", key)
        configs.setdefault(part, {"peft_type": "LORA"})[name] = value
    return configs


def _take_with_config(collected: Collected, component: str, part: _Part, fields: dict[str, Any], path: Path) -> None:
    """As PEFT reads them with this config."""
    config = parse_config(fields, path)
    sorter = Sorter(config, METHODS[config.peft_type])
    sorter.take(
        {
            f"{module}.{tensor}" if "." in tensor else f"{module}.{tensor}.weight": values
            for module, tensors in part.modules.items()
            for tensor, values in tensors.items()
        }
    )
    sorter.judge()
    collected.deltas.update({_join(component, module): delta for module, delta in sorter.deltas.items()})
    collected.changes.update({_join(component, module): change for module, change in sorter.changes.items()})
    whole = sorter.replacements()
    collected.replacements.update({_join(component, parameter): value for parameter, value in whole.items()})
    collected.problems += sorter.problems
    collected.unsupported += sorter.unsupported
    collected.notes += sorter.notes
    collected.methods.add(config.method)


def _take_alone(collected: Collected, component: str, part: _Part) -> None:
    """Without a config: an alpha for each module, or none and one rank for all, which is then the alpha too."""
    scales = _scales(collected, component, part)
    for module, tensors in part.modules.items():
        name = _join(component, module)
        alone = {key: values for key, values in tensors.items() if key != "alpha"}
        if len(collected.floats({f"{name}.{key}": values for key, values in alone.items()})) < len(alone):
            continue
        missing = [f"lora_{side}" for side in "AB" if f"lora_{side}" not in alone]
        if missing:
            collected.problems.append(f"{name}: has no {' and no '.join(missing)}; get the whole file")
            continue
        if "lora_B.bias" in alone:
            collected.unsupported.append(f"{name}: a bias on lora_B is only read where the header has {METADATA}")
            continue
        made = two_factors(alone["lora_A"], alone["lora_B"], scales.get(module, 1.0))
        if isinstance(made, str):
            collected.problems.append(f"{name}: {made}")
            continue
        magnitude = alone.get("lora_magnitude_vector")
        collected.put_delta(name, made if magnitude is None else replace(made, magnitude=magnitude.reshape(-1)))


def _scales(collected: Collected, component: str, part: _Part) -> dict[str, float]:
    """By module. Diffusers itself takes the rank of the first module for the alpha of all; which module that is, its
    versions differ in."""
    scales: dict[str, float] = {}
    ranks = {
        module: len(own["lora_A"]) for module, own in part.modules.items() if "lora_A" in own and own["lora_A"].ndim
    }
    given = {module: own["alpha"] for module, own in part.modules.items() if "alpha" in own}
    where = f" of {component}" if component else ""
    if not given and len(set(ranks.values())) > 1:
        sizes = ", ".join(map(str, sorted(set(ranks.values()))))
        collected.problems.append(
            f"the modules{where} have ranks {sizes} and no alpha, and so their scale is not told: save the file again "
            f"with diffusers 0.34 or newer, which writes {METADATA}, or add an alpha to each module"
        )
    for module in ranks if given else ():
        alpha = alpha_of(given[module]) if module in given else "has no alpha, and other modules have one"
        if isinstance(alpha, str) or not ranks[module]:
            collected.problems.append(f"{_join(component, module)}: {alpha}")
        else:
            scales[module] = alpha / ranks[module]
    return scales


def _join(component: str, name: str) -> str:
    return f"{component}.{name}" if component else name
