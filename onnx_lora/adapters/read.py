"""Which reader a path belongs to, told by what is in it. It knows no format's inside."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from onnx_lora.adapters.adapter import Adapter
from onnx_lora.adapters.formats.converted.files import (
    is_onnx_adapter,
    is_ours,
    read_onnx_adapter,
    read_onnx_file,
    read_safetensors_adapter,
)
from onnx_lora.adapters.formats.diffusion import diffusers
from onnx_lora.adapters.formats.diffusion.cloneofsimo import is_cloneofsimo, read_cloneofsimo
from onnx_lora.adapters.formats.diffusion.kohya import is_kohya, read_kohya
from onnx_lora.adapters.formats.files.gguf import MAGIC, read_gguf_file
from onnx_lora.adapters.formats.files.reading import Reading, TensorFile, opened
from onnx_lora.adapters.formats.files.safetensors import Header, read_behind, read_header
from onnx_lora.adapters.formats.files.torch_pickle import read_torch_pickle
from onnx_lora.adapters.formats.gguf.reader import read_gguf
from onnx_lora.adapters.formats.mlx import reader as mlx
from onnx_lora.adapters.formats.peft.reader import read_peft
from onnx_lora.boundary import public
from onnx_lora.errors import AdapterFileError, InputError

__all__ = ["read_adapter"]

T = TypeVar("T")

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
    is refused. MissingDependencyError: an `.onnx_adapter`, and no ONNX Runtime; a quantized GGUF file, and no `gguf`.
    InputError: `initial` for an adapter that is no PEFT folder; what is no path.
    """
    place, start = _path(path), None if initial is None else _path(initial)
    try:
        own = place.resolve().name
        is_folder, exists = place.is_dir(), place.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(f"cannot be read: {error}", path=place) from error
    if not exists:
        raise AdapterFileError("there is nothing; give an adapter's folder, or its file", path=place)
    foreign = _foreign_file(place) if is_folder else place
    if foreign is None:
        return read_peft(place, name or own, start)
    if initial is not None:
        raise InputError("an initial adapter goes with a PEFT folder only; give that, or leave it out", path=place)
    if foreign == place and is_folder:
        return mlx.read_mlx(place, name or own)
    return _read_file(foreign, name or own if is_folder else name)


def _path(path: object) -> Path:
    """Raises InputError: no path, or one of bytes."""
    if isinstance(path, str) or (isinstance(path, os.PathLike) and isinstance(path.__fspath__(), str)):
        return Path(path)
    raise InputError(f"a path must be text or a pathlib.Path, and is {type(path).__name__}")


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
        understood = _content(file, path)
    return understood(name)


def _content(file: Reading, path: Path) -> Callable[[str | None], Adapter]:
    """Reads a file's tensors, and says what makes an adapter of that name of them."""
    beginning = file.ahead(9)
    if path.name == diffusers.PICKLE:
        return _named(diffusers.read_diffusers, read_torch_pickle(file), path)
    if path.suffix == ".onnx_adapter" or is_onnx_adapter(beginning):
        return partial(read_onnx_adapter, read_onnx_file(file), path)
    if path.suffix == ".gguf" or beginning.startswith(MAGIC):
        return _named(read_gguf, read_gguf_file(file), path)
    if path.suffix == ".safetensors" or beginning[8:] == b"{":
        header = read_header(file)
        reader = _reader(header, path)
        content = read_behind(file, header)
        return partial(read_safetensors_adapter, content, path) if reader is None else _named(reader, content, path)
    raise AdapterFileError(
        f"must be a PEFT folder, or a .safetensors, .gguf or .onnx_adapter file, and is {path.resolve().name!r}; "
        "give the folder that holds adapter_config.json",
        path=path,
    )


def _named(read: Callable[[T, Path, str], Adapter], content: T, path: Path) -> Callable[[str | None], Adapter]:
    """Of a format that has no name of its own in the file: the file's."""
    return lambda name: read(content, path, name or path.stem)


def _reader(header: Header, path: Path) -> Callable[[TensorFile, Path, str], Adapter] | None:
    """Whose tensors stand behind a safetensors file's header; None: ours, or nobody's.

    Raises AdapterFileError: half of an adapter.
    """
    if is_ours(header.metadata):
        return None
    if is_kohya(header.names):
        return read_kohya
    if is_cloneofsimo(header.names):
        return read_cloneofsimo
    if diffusers.is_diffusers(header.names, header.metadata):
        return diffusers.read_diffusers
    for part, what in _HALVES:
        if any(part in tensor for tensor in header.names):
            raise AdapterFileError(f"is {what}", path=path)
    return None
