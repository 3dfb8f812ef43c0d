"""Diffusers' LoRA file out of an adapter: PEFT's names behind the parts', their configs in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx_lora.adapters.adapter import Delta, PortableAdapter
from onnx_lora.adapters.formats.diffusion.diffusers_names import METADATA
from onnx_lora.adapters.formats.peft.writer import ensure_alpha, lora_config, lora_tensors
from onnx_lora.adapters.formats.writing import dora_problems, refuse_writing, save_safetensors
from onnx_lora.adapters.module_names import PIPELINE_PARTS
from onnx_lora.kinds import Embedding
from onnx_lora.points import Array

__all__ = ["write_diffusers"]


def write_diffusers(adapter: PortableAdapter, file: Path) -> None:
    """Raises UnsupportedAdapterError: whole weights, embeddings, modules of no part of a pipeline."""
    parts: dict[str, dict[str, Delta]] = {}
    problems = [f"{name}: is a whole weight" for name in adapter.replacements]
    for module, delta in adapter.deltas.items():
        part, _, own = module.partition(".")
        if part not in PIPELINE_PARTS:
            problems.append(f"{module}: must be of a part of a pipeline ({', '.join(PIPELINE_PARTS)})")
        elif isinstance(delta.kind, Embedding):
            problems.append(f"{module}: is an embedding")
        else:
            parts.setdefault(part, {})[own] = ensure_alpha(delta)
    tensors: dict[str, Array] = {}
    configs: dict[str, Any] = {}
    for part, deltas in parts.items():
        problems.extend(f"{part}.{problem}" for problem in dora_problems(deltas))
        for name, values in lora_tensors(deltas).items():
            tensors[f"{part}.{name}"] = values
        for key, value in lora_config(deltas).items():
            configs[f"{part}.{key}"] = value
    refuse_writing(adapter, "a LoRA file of diffusers", problems)
    metadata = {"format": "pt", METADATA: json.dumps(configs, indent=2, sort_keys=True)}
    save_safetensors(file, tensors, metadata)
