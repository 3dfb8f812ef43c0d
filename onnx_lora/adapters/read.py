"""Which reader a path belongs to. It knows no format's inside."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_lora.adapters.formats.converted import is_onnx_adapter, read_onnx_adapter, read_safetensors_adapter
from onnx_lora.adapters.formats.files import opened
from onnx_lora.adapters.formats.peft import read_peft
from onnx_lora.adapters.model import Adapter
from onnx_lora.errors import AdapterFileError

__all__ = ["read_adapter"]


def read_adapter(path: str | os.PathLike[str], *, name: str | None = None) -> Adapter:
    """Read a PEFT folder, or a file that `write_bound` wrote.

    `name` is the folder's or the file's own where it is not given. Raises AdapterFileError: nothing
    there, damaged, or no adapter. UnsupportedAdapterError: an adapter of a method that is refused.
    MissingDependencyError: an `.onnx_adapter`, and no ONNX Runtime.
    """
    place = Path(path)
    try:
        own = place.resolve().name
        is_folder, exists = place.is_dir(), place.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(f"cannot be read: {error}", path=place) from error
    if not exists:
        raise AdapterFileError("there is nothing; give a PEFT folder, or a converted file", path=place)
    if is_folder:
        return read_peft(place, name or own)
    if place.suffix == ".onnx_adapter" or is_onnx_adapter(place):
        return read_onnx_adapter(place, name)
    if place.suffix == ".safetensors" or _begins_like_safetensors(place):
        return read_safetensors_adapter(place, name)
    raise AdapterFileError(
        f"must be a PEFT folder, a .safetensors or an .onnx_adapter file, and is {own!r}; "
        "give the folder that holds adapter_config.json",
        path=place,
    )


def _begins_like_safetensors(path: Path) -> bool:
    with opened(path) as file:
        return file.read(9)[8:] == b"{"
