"""Tensors by loralib's names, as PEFT's: `M.lora_A` and `M.lora_B`, without `.weight`.

microsoft/LoRA's loralib 0.1.2: its Linear computes with `lora_A` `[r, in]` and `lora_B` `[out, r]` what PEFT's does,
scale alpha / r; its MergedLinear is that of PEFT before 0.4. PEFT itself would ignore such tensors."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lora.adapters.formats.builder import AdapterBuilder
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.points import Array

__all__ = ["with_peft_names"]

_ENDINGS = (".lora_A", ".lora_B")

# Options that loralib does not have: beside them nobody knows what its names mean.
_NOT_LORALIB = ("lora_bias", "target_parameters", "use_bdlora", "use_dora", "use_qalora", "use_rslora")


def with_peft_names(tensors: Mapping[str, Array], config: PeftConfig, builder: AdapterBuilder) -> Mapping[str, Array]:
    """The tensors by PEFT's names, where all factors of a LoRA have loralib's; else as they are."""
    factors = [key for key in tensors if ".lora_" in key]
    has_other_names = not all(key.endswith(_ENDINGS) for key in factors)
    has_other_options = any(config.fields.get(option) for option in _NOT_LORALIB)
    if config.method.peft_type != "LORA" or not factors or has_other_names or has_other_options:
        return tensors
    builder.notes.append("its factors have loralib's names, and are read as loralib computes with them: alpha / r")
    refused = _refuse_merged(tensors, builder) if config.fields.get("enable_lora") is None else set()
    renamed: dict[str, Array] = {}
    for key, values in tensors.items():
        if key not in refused:
            renamed[f"{key}.weight" if key.endswith(_ENDINGS) else key] = values
    return renamed


def _refuse_merged(tensors: Mapping[str, Array], builder: AdapterBuilder) -> set[str]:
    """The tensors of each MergedLinear, of which the config does not tell the projections; the builder is told."""
    refused: set[str] = set()
    for key, a in tensors.items():
        other = f"{key.removesuffix('.lora_A')}.lora_B"
        b = tensors.get(other)
        if not key.endswith(".lora_A") or b is None:
            continue
        is_merged = a.ndim == b.ndim == 2 and a.shape[0] > b.shape[1] > 0 and a.shape[0] % b.shape[1] == 0
        if is_merged:
            refused.update((key, other))
            builder.unsupported.append(
                f"{key}: of loralib's MergedLinear, and the config does not say which of the projections have factors; "
                'write that into it, as in "enable_lora": [true, false, true]'
            )
    return refused
