"""Kohya's and LyCORIS' files as a format."""

from __future__ import annotations

from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, PortableAdapter
from onnx_lora.adapters.formats.diffusion.kohya_names import PREFIXES
from onnx_lora.adapters.formats.diffusion.kohya_reader import read_kohya
from onnx_lora.adapters.formats.diffusion.kohya_writer import write_kohya
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.module_names import KnownModules
from onnx_lora.package import Package

__all__ = ["FORMAT"]


class KohyaFormat:
    name = "kohya"
    ending = ".safetensors"
    row = Row(
        "kohya, A1111, LyCORIS (`.safetensors`)",
        "`lora_unet_`, `lora_te_`, `lora_te1_`, `lora_transformer_`, `lycoris_`",
        "alpha / rank; **without `.alpha` 1**",
        "`oft`, `boft`, T-LoRA, GLoRA",
    )

    def recognises(self, place: Place) -> bool:
        if place.header is None:
            return False
        return any(name.startswith(tuple(PREFIXES)) for name in place.header.names)

    def read(self, place: Place, name: str | None) -> Adapter:
        return read_kohya(place.tensors(), place.path, name or place.default_name)

    def write_portable(self, adapter: PortableAdapter, out: Path, package: Package | None) -> None:
        write_kohya(adapter, out, () if package is None else KnownModules.of(package).parts)


FORMAT = KohyaFormat()
