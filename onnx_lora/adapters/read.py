"""An adapter read from a path, whatever its format, or from tensors in memory. Formats of files it knows by their
registry, and none of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.adapters.adapter import Adapter
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.formats.registry import format_of_memory, recognise
from onnx_lora.boundary import public
from onnx_lora.errors import InputError

if TYPE_CHECKING:
    from onnx_lora.adapters.formats.files.memory import TorchTensor
    from onnx_lora.points import Array

__all__ = ["read_adapter"]


@public
def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, Array | TorchTensor],
    *,
    name: str | None = None,
    initial: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Adapter:
    """Read an adapter: a folder of PEFT's, MLX's or diffusers', or a file of kohya's, diffusers', cloneofsimo's,
    llama.cpp's (GGUF), ONNX Runtime's (`.onnx_adapter`), or ours; or of a format that another distribution brings. Or
    from memory: `source` PEFT's tensors by their names, as `peft.get_peft_model_state_dict` gives them, and `config`
    PEFT's config, as a mapping or as the path of an `adapter_config.json`.

    `name` is what to call it; else it is called as the folder or the file is. Where a PEFT folder or file holds
    several adapters, `name` chooses one of them. `initial`: a PEFT folder with the adapter as it was before training,
    for the methods that took it out of the base (PiSSA, OLoRA, CorDA, LoRA-GA).

    Raises AdapterFileError: nothing there, damaged, or no adapter; several, and `name` is none of them.
    UnsupportedAdapterError: an adapter of a method that is refused. MissingDependencyError: an `.onnx_adapter`, and no
    ONNX Runtime; a quantized GGUF file, and no `gguf`. PluginError: another distribution's format fails. InputError:
    `initial` for an adapter that is no PEFT folder; tensors without a config, or a config without tensors; what is no
    path.
    """
    initial_path = None if initial is None else _path(initial)
    if isinstance(source, Mapping):
        return format_of_memory().read_memory(source, _config(config), name, initial_path)
    place_path = _path(source)
    if config is not None:
        raise InputError(
            "a config goes with tensors from memory only, and files bring their own; leave it out", path=place_path
        )
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


def _config(config: object) -> Mapping[str, Any] | Path:
    """Raises InputError: there is none, or it is neither fields nor a path."""
    if config is None:
        raise InputError(
            "tensors from memory need PEFT's config, which says their scale, and there is none; give it as config, a "
            "mapping or the path of an adapter_config.json"
        )
    return config if isinstance(config, Mapping) else _path(config)
