"""What one of Optimum's graphs is compared with: Optimum's own inputs for it, and the answer of its module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onnx_lora.exporter.frontends.quiet import quiet
from onnx_lora.exporter.frontends.source import Reference

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = ["reference_of"]


def reference_of(name: str, part: Any, config: Any) -> Reference:
    """Inputs for one of Optimum's graphs, and what the module behind it answers to them. `config`: Optimum's own of
    the graph, an `OnnxConfig`."""
    inputs = {key: _mask_little(key, value) for key, value in config.generate_dummy_inputs(framework="pt").items()}

    def answer() -> dict[str, Array]:
        import torch

        # Models write into their cache: every run gets a fresh copy.
        arguments = config.rename_ambiguous_inputs(copy.deepcopy(inputs))
        with quiet(), config.patch_model_for_export(part), torch.inference_mode():
            outputs = part(**arguments)
        flat: dict[str, Array] = {}
        for key, value in outputs.items():
            onnx_name = config.torch_to_onnx_output_map.get(key, "present" if key == "past_key_values" else key)
            flat.update(_flatten(config, onnx_name, value))
        return flat

    def feeds(names: Sequence[str]) -> dict[str, Array]:
        flat: dict[str, Array] = {}
        for key, value in config.generate_dummy_inputs_for_validation(copy.deepcopy(inputs), list(names)).items():
            flat.update(_flatten(config, key, value))
        return flat

    return Reference(name, feeds, answer)


def _mask_little(name: str, value: Any) -> Any:
    """A mask `[rows, positions]` that leaves most of them; other inputs as they are.

    Optimum masks any number, and all but one often: then attention has nothing to choose from, and what keys and
    queries compute is not seen.
    """
    if not name.endswith("attention_mask") or getattr(value, "ndim", 0) != 2 or value.is_floating_point():
        return value
    few = value.shape[1] // 4
    masked = slice(None, few) if value[-1, 0] == 0 else slice(value.shape[1] - few, None)
    mask = value.new_ones(value.shape)
    mask[-1, masked] = 0
    return mask


def _flatten(config: Any, name: str, value: Any) -> dict[str, Array]:
    if isinstance(value, list | tuple):
        value = config.flatten_output_collection_property(name, value)
    if isinstance(value, dict):
        return {key: item.numpy() for key, item in value.items()}
    return {name: value.numpy()}
