"""Olive's `.onnx_adapter` files: what its names and shapes are in ours. It opens no file.

The reference is Olive 0.13, `convert-adapters`: PEFT's tensors transposed, alpha / r multiplied into B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx_lora.errors import UnsupportedAdapterError
from onnx_lora.points import Array

__all__ = ["from_olive"]

_FACTORS = (".lora_A.weight", ".lora_B.weight")
_PREFIX = "base_model.model."
_QUANTIZED = (".quant.weight", ".quant.scale", ".quant.zero_point")


def from_olive(tensors: Mapping[str, Array], path: Path) -> Mapping[str, Array]:
    """Factors with two axes get the first that ours have, and names lose what PEFT puts in front; the rest stays.

    Raises UnsupportedAdapterError: factors that Olive quantized, or a name that comes twice.
    """
    quantized = [name for name in tensors if name.endswith(_QUANTIZED)]
    if quantized:
        raise UnsupportedAdapterError(
            "holds factors that Olive quantized to 4 bits; convert the PEFT adapter again, without --quantize_int4",
            path=path,
            problems=quantized,
        )
    theirs = {name for name, values in tensors.items() if name.endswith(_FACTORS) and values.ndim == 2}
    if not theirs:
        return tensors
    ours: dict[str, Array] = {}
    for name, values in tensors.items():
        ours[name.removeprefix(_PREFIX)] = values[None] if name in theirs else values
    if len(ours) < len(tensors):
        raise UnsupportedAdapterError("holds names with and without PEFT's prefix for one module", path=path)
    return ours
