"""An adapter read from a path, whatever its format. It knows which there are by their registry, and none of them."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_lora.adapters.adapter import Adapter
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.formats.registry import recognise
from onnx_lora.boundary import public
from onnx_lora.errors import InputError

__all__ = ["read_adapter"]


@public
def read_adapter(
    path: str | os.PathLike[str], *, name: str | None = None, initial: str | os.PathLike[str] | None = None
) -> Adapter:
    """Read an adapter: a folder of PEFT's, MLX's or diffusers', or a file of kohya's, diffusers', cloneofsimo's,
    llama.cpp's (GGUF), ONNX Runtime's (`.onnx_adapter`), or ours; or of a format that another distribution brings.

    `name` is the folder's or the file's own where it is not given. `initial`: a PEFT folder with the adapter as it was
    before training, for the methods that took it out of the base (PiSSA, OLoRA, CorDA, LoRA-GA).

    Raises AdapterFileError: nothing there, damaged, or no adapter. UnsupportedAdapterError: an adapter of a method that
    is refused. MissingDependencyError: an `.onnx_adapter`, and no ONNX Runtime; a quantized GGUF file, and no `gguf`.
    PluginError: another distribution's format fails. InputError: `initial` for an adapter that is no PEFT folder; what
    is no path.
    """
    place_path = _path(path)
    initial_path = None if initial is None else _path(initial)
    with Place.open(place_path) as place:
        format = recognise(place)
        if initial_path is not None and not format.reads_initial:
            raise InputError(
                "an initial adapter goes with a PEFT folder only; give that, or leave it out", path=place_path
            )
        return format.read(place, name, initial_path)


def _path(path: object) -> Path:
    """Raises InputError: no path, or one of bytes."""
    if isinstance(path, str) or (isinstance(path, os.PathLike) and isinstance(path.__fspath__(), str)):
        return Path(path)
    raise InputError(f"a path must be text or a pathlib.Path, and is {type(path).__name__}")
