"""The config of the model that a package was made of, where it lies beside the graphs. It knows none of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onnx_lora.errors import AdapterFileError
from onnx_lora.json_file import read_json

if TYPE_CHECKING:
    from onnx_lora.package import Package

__all__ = ["config_of"]


def config_of(package: Package) -> Mapping[str, Any]:
    """Hugging Face's `config.json`; empty where there is none, or none that can be read."""
    try:
        return read_json(package.path / "config.json", AdapterFileError)
    except AdapterFileError:
        return {}
