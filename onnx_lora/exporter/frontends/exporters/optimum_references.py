"""What one of Optimum's graphs is compared with: Optimum's own inputs for it, and the answer of its module."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onnx_lora.exporter.frontends.quiet import quiet
from onnx_lora.exporter.frontends.source import Reference

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = ["reference_of"]

# Inputs that models make themselves where they are not given.
_OPTIONAL = frozenset({"attention_mask", "decoder_attention_mask", "pixel_mask", "position_ids", "token_type_ids"})


def reference_of(name: str, part: Any, config: Any) -> Reference:
    """Inputs for one of Optimum's graphs, and what the module behind it answers to them. `config`: Optimum's own of
    the graph, an `OnnxConfig`."""
    inputs: dict[str, Any] = {}
    for key, value in config.generate_dummy_inputs(framework="pt").items():
        inputs[key] = _mask_little(key, value)
    return _reference_with(name, part, config, inputs)


def _reference_with(name: str, part: Any, config: Any, inputs: dict[str, Any]) -> Reference:
    """The reference whose model is given these inputs."""

    def answer() -> dict[str, Array]:
        import torch

        # Models write into their cache: every run gets a fresh copy.
        arguments = config.rename_ambiguous_inputs(copy.deepcopy(inputs))
        if "use_cache" in inspect.signature(part.forward).parameters:
            # Gemma 3's class for pictures heeds no config here.
            arguments["use_cache"] = bool(getattr(config, "use_past", False))
        with quiet(), config.patch_model_for_export(part), torch.inference_mode():
            outputs = part(**arguments)
        flat: dict[str, Array] = {}
        for key, value in outputs.items():
            own_name = "present" if key == "past_key_values" else key
            onnx_name = config.torch_to_onnx_output_map.get(key, own_name)
            flat.update(_flatten(config, onnx_name, value))
        return flat

    def feeds(names: Sequence[str]) -> dict[str, Array]:
        flat: dict[str, Array] = {}
        fresh = copy.deepcopy(inputs)
        for key, value in config.generate_dummy_inputs_for_validation(fresh, list(names)).items():
            flat.update(_flatten(config, key, value))
        return flat

    def left_out(names: Sequence[str]) -> tuple[str, ...]:
        lacking: list[str] = []
        for key, value in inputs.items():
            own = set(_flatten(config, key, value))
            if key in _OPTIONAL and not own & set(names):
                lacking.append(key)
        return tuple(lacking)

    def without(names: Sequence[str]) -> Reference:
        kept = {key: value for key, value in inputs.items() if key not in names}
        return replace(_reference_with(name, part, config, kept), dropped=tuple(names))

    return Reference(name, feeds, answer, left_out, without)


def _mask_little(name: str, value: Any) -> Any:
    """Let a mask `[rows, positions]` leave most positions; other inputs stay as they are.

    Optimum masks a random number of positions, and often all but one. Attention has nothing to choose from then, and
    the comparison would not see what keys and queries compute.
    """
    is_mask = name.endswith("attention_mask") and getattr(value, "ndim", 0) == 2
    if not is_mask or value.is_floating_point():
        return value
    positions = value.shape[1]
    few = positions // 4
    masked = slice(positions - few, None)
    if value[-1, 0] == 0:
        masked = slice(None, few)
    mask = value.new_ones(value.shape)
    mask[-1, masked] = 0
    return mask


def _flatten(config: Any, name: str, value: Any) -> dict[str, Array]:
    """Arrays by the graph's names: one for a tensor, several for a collection of them."""
    if isinstance(value, list | tuple):
        value = config.flatten_output_collection_property(name, value)
    if isinstance(value, dict):
        return {key: item.numpy() for key, item in value.items()}
    return {name: value.numpy()}
