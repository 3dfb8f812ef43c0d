"""llama.cpp's LoRA files as a format."""

from __future__ import annotations

from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, PortableAdapter
from onnx_lora.adapters.formats.files.gguf_file import MAGIC, read_gguf_file
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.gguf.reader import read_gguf
from onnx_lora.adapters.formats.gguf.writer import write_gguf
from onnx_lora.adapters.formats.place import Place
from onnx_lora.package import Package

__all__ = ["FORMAT"]


class GgufFormat:
    name = "gguf"
    ending = ".gguf"
    row = Row(
        "GGUF (llama.cpp)",
        "its magic number",
        "alpha / rank",
        "architectures whose names are not in the table, an unknown number of attention heads; DoRA when written",
    )

    def recognises(self, place: Place) -> bool:
        return not place.is_folder and (place.path.suffix == self.ending or place.beginning.startswith(MAGIC))

    def read(self, place: Place, name: str | None) -> Adapter:
        return read_gguf(place.read(read_gguf_file), place.path, name or place.default_name)

    def write_portable(self, adapter: PortableAdapter, out: Path, package: Package | None) -> None:
        write_gguf(adapter, out, {} if package is None else package.config)


FORMAT = GgufFormat()
