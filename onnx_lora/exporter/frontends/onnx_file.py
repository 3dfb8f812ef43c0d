"""An ONNX file that somebody else exported, with or without the checkpoint it was made from."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_lora.errors import ModelError
from onnx_lora.exporter.build import Source
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.source import Loaded, companions_of

__all__ = ["load_onnx"]


def load_onnx(onnx_file: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None) -> Loaded:
    """One `.onnx` file, or a folder of them (encoder and decoder, say) that makes one package.

    Raises ModelError: there is no such file, or no ONNX file in the folder, or no checkpoint.
    """
    path = Path(onnx_file)
    if path.is_dir():
        files = sorted(path.glob("*.onnx"))
        if not files:
            raise ModelError("must hold .onnx files, and has none", path=path)
    elif path.is_file():
        files = [path]
    else:
        raise ModelError("there is no such file", path=path)
    names = [file.stem for file in files] if len(files) > 1 else ["model"]
    if clash := [name for name in names if name.startswith("base.") or name == "base"]:
        raise ModelError(f"{clash[0]}.onnx has a name that a package gives its base graph; rename it", path=path)
    sources = tuple(Source(name, file) for name, file in zip(names, files, strict=True))
    folder = path if path.is_dir() else path.parent
    weights = None
    if checkpoint is not None:
        if not Path(checkpoint).is_dir():
            raise ModelError("a checkpoint must be a folder with .safetensors weights", path=Path(checkpoint))
        weights = Checkpoint.of_folder(Path(checkpoint))
    origin = {"made_by": "attach", "from": path.name}
    return Loaded(sources, origin, weights, companions_of(folder))
