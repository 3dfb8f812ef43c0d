"""PEFT's folders as a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_lora.adapters.adapter import Adapter, PortableAdapter
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.peft.config import CONFIG
from onnx_lora.adapters.formats.peft.reader import list_names, read_memory, read_peft
from onnx_lora.adapters.formats.peft.writer import write_peft
from onnx_lora.adapters.formats.place import Place
from onnx_lora.package import Package

__all__ = ["FORMAT"]


class PeftFormat:
    name = "peft"
    ending = ""
    row = Row(
        "PEFT folder",
        "`adapter_config.json` with `peft_type`",
        "alpha / r, alpha / √r, by module",
        "see [adapters.md](adapters.md)",
    )

    def recognises(self, place: Place) -> bool:
        fields = place.config(CONFIG)
        return fields is not None and "peft_type" in fields

    def names(self, place: Place) -> Sequence[str | None]:
        return list_names(place.path)

    def read(self, place: Place, name: str | None) -> Adapter:
        return read_peft(place.path, name)

    def read_with_initial(self, place: Place, name: str | None, initial: Path) -> Adapter:
        return read_peft(place.path, name, initial)

    def read_memory(
        self, tensors: Mapping[str, Any], config: Mapping[str, Any] | Path, name: str | None, initial: Path | None
    ) -> Adapter:
        return read_memory(tensors, config, name, initial)

    def write_portable(self, adapter: PortableAdapter, out: Path, package: Package | None) -> None:
        del package
        write_peft(adapter, out)


FORMAT = PeftFormat()
