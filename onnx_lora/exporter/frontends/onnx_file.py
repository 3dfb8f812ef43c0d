"""An ONNX file that somebody else exported, with or without the checkpoint it was made from."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_lora.companions import check_folder
from onnx_lora.errors import ModelError
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.huggingface import base_of, name_of
from onnx_lora.exporter.frontends.source import COMPANIONS, Loaded, companions_of
from onnx_lora.exporter.genai_names import GenaiNames
from onnx_lora.exporter.graph_files import GraphFile
from onnx_lora.manifest import MANIFEST

__all__ = ["load_onnx"]


def load_onnx(onnx_file: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None) -> Loaded:
    """One `.onnx` file, or a folder of them (encoder and decoder, say) that makes one package.

    Raises ModelError: there is no such file, or no ONNX file in the folder, or no checkpoint.
    """
    path = Path(onnx_file)
    if (path / MANIFEST).is_file():
        raise ModelError("is a package of onnx-lora already; give the ONNX file that it was made from", path=path)
    if path.is_dir():
        files = sorted(path.glob("*.onnx"))
        if not files:
            raise ModelError("must hold .onnx files, and has none", path=path)
    elif path.is_file():
        files = [path]
    else:
        raise ModelError("there is no such file", path=path)
    folder = path if path.is_dir() else path.parent
    # Of a file's folder only what comes along: it may be anybody's home.
    check_folder(folder, ModelError, depth=1, patterns=("*",) if path.is_dir() else COMPANIONS)
    several = len(files) > 1
    names = [file.stem if several or _is_named_in_config(file) else "model" for file in files]
    if clash := [name for name in names if name.startswith("base.") or name == "base"]:
        raise ModelError(f"{clash[0]}.onnx has a name that a package gives its base graph; rename it", path=path)
    sources = tuple(GraphFile(name, file) for name, file in zip(names, files, strict=True))
    weights = None
    if checkpoint is not None:
        if not Path(checkpoint).is_dir():
            raise ModelError("a checkpoint must be a folder with .safetensors weights", path=Path(checkpoint))
        check_folder(Path(checkpoint), ModelError)
        weights = Checkpoint.of_folder(Path(checkpoint))
    origin = {"made_by": "attach", "from": path.name} | _base(folder, checkpoint)
    genai = GenaiNames.of_folder(folder) if weights is None else None
    return Loaded(sources, origin, weights, companions_of(folder), names=genai)


def _base(folder: Path, checkpoint: str | os.PathLike[str] | None) -> dict[str, str]:
    """The model's name: as the configs say, else as the checkpoint's folder is called."""
    if checkpoint is None:
        return base_of(folder)
    return {"base": name_of(checkpoint)} | base_of(folder) | base_of(checkpoint)


def _is_named_in_config(file: Path) -> bool:
    """Whether ONNX Runtime GenAI's config beside it, which goes into the package too, means it by its name."""
    config = file.parent / "genai_config.json"
    try:
        return config.is_file() and f'"{file.name}"' in config.read_text("utf-8")
    except (OSError, ValueError):
        return False
