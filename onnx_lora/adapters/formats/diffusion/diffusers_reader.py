"""Diffusers' LoRA files: what their tensors come to, and which scale is meant.

The reference is diffusers 0.35: `loaders/lora_base.py`, `utils/peft_utils.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from onnx_lora.adapters.adapter import Adapter, Origin
from onnx_lora.adapters.formats.builder import AdapterBuilder, alpha_of, two_factors
from onnx_lora.adapters.formats.diffusion.diffusers_names import METADATA, parse_name
from onnx_lora.adapters.formats.files.reading import TensorFile, parse_json
from onnx_lora.adapters.formats.peft.building import build_adapter
from onnx_lora.adapters.formats.peft.config import parse_config
from onnx_lora.adapters.module_names import PIPELINE_PARTS
from onnx_lora.adapters.problems import TensorError
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.points import Array

__all__ = ["read_diffusers"]

# A part of a pipeline: tensors by PEFT's names, by module.
_Modules: TypeAlias = dict[str, dict[str, Array]]


def read_diffusers(file: TensorFile, path: Path, name: str) -> Adapter:
    """The scale of a part is what its PEFT config in the header says; without one alpha / r with each module's alpha;
    without alphas 1.

    `lora_A` `[r, in]` or `[r, channels, *kernel]`, `lora_B` `[out, r]`, axes of size 1 behind.

    Raises AdapterFileError: damaged, or a scale that the file does not tell. UnsupportedAdapterError: what is refused.
    """
    builder = AdapterBuilder()
    parts = _parts(builder, file.tensors)
    configs = _configs(file.metadata, path)
    for component, modules in parts.items():
        if configs and component == "" and "" not in configs:
            # Where a part is named and has no config, diffusers takes the rank for the alpha. Where none is named it
            # would look for a config that is not there.
            builder.problems.append(
                f"the header has configs of {', '.join(configs)}, and the tensors' names no part; put it in front"
            )
        elif component in configs:
            _take_with_config(builder, component, modules, configs[component], path)
        else:
            _take_alone(builder, component, modules)
    return builder.adapter(name, Origin(str(path), file.sha256, "diffusers", "", ""))


def _parts(builder: AdapterBuilder, tensors: Mapping[str, Array]) -> dict[str, _Modules]:
    """The file's tensors by part of the pipeline, module and PEFT's name."""
    parts: dict[str, _Modules] = {}
    for key, values in tensors.items():
        found = parse_name(key)
        if found is None:
            builder.unsupported.append(f"{key}: is no tensor of LoRA known here; upgrade onnx-lora")
            continue
        own = parts.setdefault(found.component, {}).setdefault(found.module, {})
        if found.tensor in own:
            builder.problems.append(f"{key}: there are two tensors for {found.tensor} of {found.module}")
        own[found.tensor] = values
    return parts


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """The PEFT config of each part that the header has one of; a network saved alone has one without a part's name."""
    text = metadata.get(METADATA, "{}")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in parse_json(text.encode(), path, what=METADATA).items():
        part, dot, field = key.partition(".")
        if not dot or part not in PIPELINE_PARTS:
            part, field = "", key
        config = configs.setdefault(part, {"peft_type": "LORA"})
        config[field] = value
    return configs


def _take_with_config(
    builder: AdapterBuilder, component: str, modules: _Modules, fields: dict[str, Any], path: Path
) -> None:
    """Put in what PEFT reads of the tensors with this config."""
    config = parse_config(fields, path)
    tensors: dict[str, Array] = {}
    for module, own in modules.items():
        for tensor, values in own.items():
            end = "" if "." in tensor else ".weight"
            tensors[f"{module}.{tensor}{end}"] = values
    of_part = build_adapter(tensors, config)
    builder.absorb(of_part, prefix=_join(component, ""))


def _take_alone(builder: AdapterBuilder, component: str, modules: _Modules) -> None:
    """Put in a part that has no config: each module has an alpha, or none has and all have one rank."""
    scales = _scales(builder, component, modules)
    for module, tensors in modules.items():
        name = _join(component, module)
        factors = {key: values for key, values in tensors.items() if key != "alpha"}
        floats = builder.floats({f"{name}.{key}": values for key, values in factors.items()})
        if len(floats) < len(factors):
            continue
        is_pair = "lora_A" in factors and "lora_B" in factors
        if is_pair and "lora_B.bias" in factors:
            builder.unsupported.append(f"{name}: a bias on lora_B is only read where the header has {METADATA}")
            continue
        with builder.reading(name):
            _put(builder, name, factors, scales.get(module, 1.0))


def _put(builder: AdapterBuilder, name: str, tensors: Mapping[str, Array], scale: float) -> None:
    """Raises TensorError: a factor is missing, or the two do not fit."""
    missing = [factor for factor in ("lora_A", "lora_B") if factor not in tensors]
    if missing:
        raise TensorError(f"has no {' and no '.join(missing)}; get the whole file")
    made = two_factors(tensors["lora_A"], tensors["lora_B"], scale)
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is not None:
        made = replace(made, magnitude=magnitude.reshape(-1))
    builder.put_delta(name, made)


def _scales(builder: AdapterBuilder, component: str, modules: _Modules) -> dict[str, float]:
    """alpha / r by module; none where the file has no alphas.

    Without alphas diffusers itself takes the rank of the first module for the alpha of all. Its versions differ in
    which module is the first, so two ranks are refused.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, Array] = {}
    for module, tensors in modules.items():
        if "lora_A" in tensors and tensors["lora_A"].ndim:
            ranks[module] = len(tensors["lora_A"])
        if "alpha" in tensors:
            alphas[module] = tensors["alpha"]
    if not alphas:
        sizes = sorted(set(ranks.values()))
        if len(sizes) > 1:
            builder.problems.append(_explain_unknown_scale(component, sizes))
        return {}
    scales: dict[str, float] = {}
    for module, rank in ranks.items():
        with builder.reading(_join(component, module)):
            if module not in alphas:
                raise TensorError("has no alpha, and other modules have one")
            if rank == 0:
                raise TensorError("lora_A must have a rank of at least 1, and is empty")
            scales[module] = lora_scale(alpha_of(alphas[module]), rank)
    return scales


def _explain_unknown_scale(component: str, ranks: Sequence[int]) -> str:
    where = f" of {component}" if component else ""
    sizes = ", ".join(str(rank) for rank in ranks)
    return (
        f"the modules{where} have ranks {sizes} and no alpha, so the file does not tell their scale: "
        f"save the file again with diffusers 0.34 or newer, which writes {METADATA}, or add an alpha to each module"
    )


def _join(component: str, name: str) -> str:
    return f"{component}.{name}" if component else name
