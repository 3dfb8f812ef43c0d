"""What a source of graphs hands to `build`: ONNX files on disk, and what is known about them. It reads no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_lora.exporter.calls import Calls
    from onnx_lora.exporter.checkpoint import Checkpoint
    from onnx_lora.exporter.genai_names import GenaiNames

__all__ = ["GraphFile", "Loaded"]


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One ONNX file to be given points, and its name in the package.

    `prefix` is put before the names of its modules ("unet."), where several models share a package; `checkpoint` is
    then its own. `calls`: what torch does with each module, without the prefix; None where torch was not asked.
    """

    name: str
    file: Path
    prefix: str = ""
    checkpoint: Checkpoint | None = None
    calls: Calls | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """ONNX files on disk, and what is known about them.

    `origin` is written into the manifest. `checkpoint`: the weights the graphs were made from, where they are known;
    `names`: what a folder of ONNX Runtime GenAI's says of its modules. `companions`: files and folders that come along
    into the package. `scratch`: a folder whose files were made for the package alone, and may be moved into it.
    """

    sources: tuple[GraphFile, ...]
    origin: dict[str, str]
    checkpoint: Checkpoint | None = None
    companions: tuple[Path, ...] = ()
    scratch: Path | None = None
    names: GenaiNames | None = None
