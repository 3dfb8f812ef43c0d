"""Diffusers' LoRA files as a format: alone, or in the folder that `save_lora_weights` writes."""

from __future__ import annotations

from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, PortableAdapter
from onnx_lora.adapters.formats.diffusion.diffusers_names import FILE, PICKLE, has_own_names
from onnx_lora.adapters.formats.diffusion.diffusers_reader import read_diffusers
from onnx_lora.adapters.formats.diffusion.diffusers_writer import write_diffusers
from onnx_lora.adapters.formats.files.torch_pickle import read_torch_pickle
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.formats.registry import recognise
from onnx_lora.package import Package

__all__ = ["FORMAT"]

# A folder with this file is PEFT's or MLX's, whatever lies beside it.
_OTHER_CONFIG = "adapter_config.json"


class DiffusersFormat:
    name = "diffusers"
    ending = ".safetensors"
    row = Row(
        "diffusers (file or folder)",
        "`unet.`, `text_encoder.`, `transformer.` before names of factors, old spellings and PEFT's",
        "the header's `lora_adapter_metadata`, else `network_alphas`, else 1",
        "what PEFT refuses",
    )

    def recognises(self, place: Place) -> bool:
        if place.is_folder:
            return not place.has(_OTHER_CONFIG) and (place.has(FILE) or place.has(PICKLE))
        if place.path.name == PICKLE:
            return True
        return place.header is not None and has_own_names(place.header.names, place.header.metadata)

    def read(self, place: Place, name: str | None) -> Adapter:
        if place.is_folder:
            # People put other tools' files under diffusers' name, too.
            with place.open_inside(FILE if place.has(FILE) else PICKLE) as file:
                return recognise(file).read(file, name)
        content = place.read(read_torch_pickle) if place.path.name == PICKLE else place.tensors()
        return read_diffusers(content, place.path, name or place.default_name)

    def write_portable(self, adapter: PortableAdapter, out: Path, package: Package | None) -> None:
        del package
        write_diffusers(adapter, out)


FORMAT = DiffusersFormat()
