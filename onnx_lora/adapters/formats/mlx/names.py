"""What mlx-lm calls the files of an adapter, and the fields of a config that only it writes."""

from __future__ import annotations

__all__ = ["CONFIG", "CONFIG_FIELDS", "NPZ", "WEIGHTS"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
NPZ = "adapters.npz"

# PEFT's file of the same name has none of them.
CONFIG_FIELDS = frozenset({"fine_tune_type", "lora_parameters", "lora_layers"})
