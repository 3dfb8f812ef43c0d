"""mlx-lm's adapter folders as a format."""

from __future__ import annotations

from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, PortableAdapter
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.mlx.names import CONFIG, CONFIG_FIELDS, NPZ, WEIGHTS
from onnx_lora.adapters.formats.mlx.reader import read_mlx
from onnx_lora.adapters.formats.mlx.writer import write_mlx
from onnx_lora.adapters.formats.place import Place
from onnx_lora.package import Package

__all__ = ["FORMAT"]


class MlxFormat:
    name = "mlx"
    ending = ""
    row = Row(
        "MLX folder (`adapters.safetensors`, `adapters.npz`)",
        "`fine_tune_type`, `lora_parameters`",
        "**`scale` as it is**",
        "an `alpha` beside it (mlx-lm changed its meaning), no config, switch layers",
    )

    def recognises(self, place: Place) -> bool:
        """By its config; or by its weights where there is no config, so that reading says what is missing."""
        if not place.has(CONFIG):
            return place.has(WEIGHTS) or place.has(NPZ)
        fields = place.config(CONFIG)
        return fields is not None and "peft_type" not in fields and not CONFIG_FIELDS.isdisjoint(fields)

    def read(self, place: Place, name: str | None) -> Adapter:
        return read_mlx(place.path, name or place.default_name)

    def write_portable(self, adapter: PortableAdapter, out: Path, package: Package | None) -> None:
        del package
        write_mlx(adapter, out)


FORMAT = MlxFormat()
