"""The config of the model that a package was made of, where it lies beside the graphs. It knows none of its fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onnx_lora.package import Package

__all__ = ["config_of"]

_LIMIT = 16 * 2**20  # bytes, more than any config has


def config_of(package: Package) -> Mapping[str, Any]:
    """Hugging Face's `config.json`; empty where there is none, or none that can be read."""
    try:
        with (package.path / "config.json").open("rb") as file:
            text = file.read(_LIMIT + 1)
        config = json.loads(text) if len(text) <= _LIMIT else None
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
