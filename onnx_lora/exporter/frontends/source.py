"""What every frontend hands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_lora.exporter.build import Source
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.points import Array

__all__ = ["COMPANIONS", "Loaded", "Reference", "companions_of"]

# Files that make a model usable, and that go into the package as they are.
COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "LICENSE*",
)

# JSON files that are not about the model as such.
_NOT_COMPANIONS = ("onnx_lora.json", "adapter_config.json", "trainer_state.json", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Loaded:
    """ONNX files on disk, with what is known about them. `origin` is written into the manifest; files in
    `scratch` were made for the package alone."""

    sources: tuple[Source, ...]
    origin: dict[str, str]
    checkpoint: Checkpoint | None = None
    companions: tuple[Path, ...] = ()
    scratch: Path | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """What a graph must reproduce: inputs for the given names (two rows), and PyTorch's answer by output name."""

    graph: str
    feeds: Callable[[Sequence[str]], dict[str, Array]]
    answer: Callable[[], dict[str, Array]]


def companions_of(folder: Path) -> tuple[Path, ...]:
    """The configuration and tokenizer files of a model's folder."""
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return tuple(sorted(file for file in found if file.name not in _NOT_COMPANIONS))
