"""Diffusers' LoRA file out of an adapter: PEFT's names behind the parts', their configs in the header."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.numpy

from onnx_lora.adapters.adapter import Delta, PortableAdapter
from onnx_lora.adapters.formats.diffusion.diffusers_names import COMPONENTS, METADATA
from onnx_lora.adapters.formats.peft.writer import (
    contiguous,
    dora_problems,
    lora_config,
    lora_tensors,
    refuse,
    with_alpha,
)
from onnx_lora.kinds import Embedding

__all__ = ["write_diffusers"]


def write_diffusers(adapter: PortableAdapter, file: Path) -> None:
    """Raises UnsupportedAdapterError: whole weights, embeddings, modules of no part of a pipeline."""
    parts: dict[str, dict[str, Delta]] = {}
    problems = [f"{name}: is a whole weight" for name in adapter.replacements]
    for module, delta in adapter.deltas.items():
        part, _, own = module.partition(".")
        if part not in COMPONENTS:
            problems.append(f"{module}: must be of a part of a pipeline ({', '.join(COMPONENTS)})")
        elif isinstance(delta.kind, Embedding):
            problems.append(f"{module}: is an embedding")
        else:
            parts.setdefault(part, {})[own] = with_alpha(delta)
    for part, deltas in parts.items():
        problems += [f"{part}.{problem}" for problem in dora_problems(deltas)]
    refuse(adapter, "a LoRA file of diffusers", problems)
    tensors = {
        f"{part}.{name}": values for part, deltas in parts.items() for name, values in lora_tensors(deltas).items()
    }
    configs = {f"{part}.{key}": value for part, deltas in parts.items() for key, value in lora_config(deltas).items()}
    metadata = {"format": "pt", METADATA: json.dumps(configs, indent=2, sort_keys=True)}
    file.write_bytes(safetensors.numpy.save(contiguous(tensors), metadata))
