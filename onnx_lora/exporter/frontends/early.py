"""Misspelt targets, found in the names of a checkpoint's tensors before anything is loaded. It reads headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from safetensors import SafetensorError, safe_open

from onnx_lora.errors import ModelError, OnnxLoraError
from onnx_lora.exporter.sites.targets import ALL, ALL_LINEAR
from onnx_lora.heads import OFTEN_TIED, OUTPUT_LAYERS
from onnx_lora.json_file import read_json

__all__ = ["check_targets"]

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_INDEX_LIMIT = 64 * 2**20  # bytes

# Modules that a model has and its checkpoint may not: heads of another class, and those that share a table's weight.
_NOT_STORED = frozenset(OUTPUT_LAYERS) | OFTEN_TIED


def check_targets(model: str | os.PathLike[str], targets: str | Iterable[str]) -> None:
    """Check that each name in `targets` may be a module's of the checkpoint in a folder.

    Only a misspelt name is refused here: no tensor's name has such a part, and some have one that is nearly the same.
    The library that loads the checkpoint may call modules otherwise, and the graph has the last word.

    Raises ModelError: a name is misspelt.
    """
    if isinstance(targets, str):
        return
    parts: set[str] = set()
    for name in _tensor_names(Path(model)):
        parts.update(name.split("."))
    problems: list[str] = []
    for target in targets:
        last = target.rpartition(".")[2]
        if target in (ALL, ALL_LINEAR) or last in parts or last in _NOT_STORED:
            continue
        close = get_close_matches(last, parts, n=3, cutoff=0.8)
        if close:
            problems.append(f"{target!r} names no module; close: {', '.join(close)}")
    if problems:
        raise ModelError("targets must name modules of the checkpoint", path=model, problems=problems)


def _tensor_names(folder: Path) -> Iterable[str]:
    """The names of a checkpoint's tensors; none where they cannot be told without loading it."""
    try:
        for name in _INDICES:
            if (folder / name).is_file():
                shards = read_json(folder / name, ModelError, limit=_INDEX_LIMIT).get("weight_map")
                return list(shards) if isinstance(shards, dict) else []
        file = folder / "model.safetensors"
        if not file.is_file():
            return []
        with safe_open(str(file), framework="numpy") as opened:
            return list(opened.keys())
    except (OnnxLoraError, SafetensorError, OSError):
        return []  # whoever loads it says what is wrong
