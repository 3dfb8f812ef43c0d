"""Which reader a path belongs to, told by what is in it. It knows no format's inside."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_lora.adapters.formats import diffusers, mlx
from onnx_lora.adapters.formats.cloneofsimo import is_cloneofsimo, read_cloneofsimo
from onnx_lora.adapters.formats.converted import (
    is_onnx_adapter,
    is_ours,
    read_onnx_adapter,
    read_safetensors_adapter,
)
from onnx_lora.adapters.formats.files import opened
from onnx_lora.adapters.formats.gguf import read_gguf
from onnx_lora.adapters.formats.gguf_file import MAGIC
from onnx_lora.adapters.formats.kohya import is_kohya, read_kohya
from onnx_lora.adapters.formats.peft import read_peft
from onnx_lora.adapters.formats.safetensors_file import SafetensorsFile, read_names, read_safetensors
from onnx_lora.adapters.formats.torch_pickle import read_torch_pickle
from onnx_lora.adapters.model import Adapter
from onnx_lora.boundary import public
from onnx_lora.errors import AdapterFileError, InputError

__all__ = ["read_adapter"]

# Where a file lies that is only half of an adapter, by what its names hold.
_HALVES = (
    (".lora_a", "MLX's weights; the scale is in adapter_config.json beside them: give the folder"),
    ("base_model.model.", "PEFT's weights; the scale is in adapter_config.json beside them: give the folder"),
)


@public
def read_adapter(
    path: str | os.PathLike[str], *, name: str | None = None, initial: str | os.PathLike[str] | None = None
) -> Adapter:
    """Read an adapter: a folder of PEFT's, MLX's or diffusers', or a file of kohya's, diffusers', cloneofsimo's,
    llama.cpp's (GGUF), ONNX Runtime's (`.onnx_adapter`), or ours.

    `name` is the folder's or the file's own where it is not given. `initial`: a PEFT folder with the adapter as it was
    before training, for the methods that took it out of the base (PiSSA, OLoRA, CorDA, LoRA-GA).

    Raises AdapterFileError: nothing there, damaged, or no adapter. UnsupportedAdapterError: an adapter of a method that
    is refused. MissingDependencyError: an `.onnx_adapter`, and no ONNX Runtime; a quantised GGUF file, and no `gguf`.
    InputError: `initial` for an adapter that is no PEFT folder.
    """
    place = Path(path)
    try:
        own = place.resolve().name
        is_folder, exists = place.is_dir(), place.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(f"cannot be read: {error}", path=place) from error
    if not exists:
        raise AdapterFileError("there is nothing; give an adapter's folder, or its file", path=place)
    foreign = _foreign_file(place) if is_folder else place
    if foreign is None:
        return read_peft(place, name or own, None if initial is None else Path(initial))
    if initial is not None:
        raise InputError("an initial adapter goes with a PEFT folder only; give that, or leave it out", path=place)
    if foreign == place and is_folder:
        return mlx.read_mlx(place, name or own)
    return _read_file(foreign, name or own if is_folder else name)


def _foreign_file(folder: Path) -> Path | None:
    """What to read of a folder that is another format's than PEFT's: MLX's folder itself, or diffusers' file."""
    config = folder / mlx.CONFIG
    if config.is_file():
        return folder if mlx.is_mlx_config(config) else None
    for file in (folder / diffusers.FILE, folder / diffusers.PICKLE):
        if file.is_file():
            return file
    return folder if any((folder / own).is_file() for own in (mlx.WEIGHTS, mlx.NPZ)) else None


def _read_file(path: Path, name: str | None) -> Adapter:
    with opened(path) as file:
        beginning = file.read(9)
    if path.name == diffusers.PICKLE:
        return diffusers.read_diffusers(SafetensorsFile(read_torch_pickle(path), {}), path, name or path.stem)
    if path.suffix == ".onnx_adapter" or is_onnx_adapter(path):
        return read_onnx_adapter(path, name)
    if path.suffix == ".gguf" or beginning.startswith(MAGIC):
        return read_gguf(path, name or path.stem)
    if path.suffix == ".safetensors" or beginning[8:] == b"{":
        return _read_safetensors(path, name)
    raise AdapterFileError(
        f"must be a PEFT folder, or a .safetensors, .gguf or .onnx_adapter file, and is {path.resolve().name!r}; "
        "give the folder that holds adapter_config.json",
        path=path,
    )


def _read_safetensors(path: Path, name: str | None) -> Adapter:
    names, metadata = read_names(path)
    if is_ours(metadata):
        return read_safetensors_adapter(path, name)
    own = name or path.stem
    if is_kohya(names):
        return read_kohya(read_safetensors(path), path, own)
    if is_cloneofsimo(names):
        return read_cloneofsimo(read_safetensors(path), path, own)
    if diffusers.is_diffusers(names, metadata):
        return diffusers.read_diffusers(read_safetensors(path), path, own)
    for part, what in _HALVES:
        if any(part in tensor for tensor in names):
            raise AdapterFileError(f"is {what}", path=path)
    return read_safetensors_adapter(path, name)
