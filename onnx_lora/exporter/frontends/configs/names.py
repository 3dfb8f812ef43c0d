"""What a manifest calls the model that a package was made from: never a path of the machine that made it. It reads a
folder's config for the name alone."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from onnx_lora.errors import ModelError, OnnxLoraError
from onnx_lora.json_file import read_json

__all__ = ["base_of", "base_of_fields", "name_of", "short_name"]

# Where the hub's client keeps a repository: models--ORG--NAME/snapshots/HASH.
_HUB_CACHE = re.compile(r"/models--([^/]+)/snapshots/")

# The files that may name a folder's model: a checkpoint's config, a pipeline's index.
_CONFIGS = ("config.json", "model_index.json")

# The field of these files that names it.
_NAME = "_name_or_path"


def name_of(model: str | os.PathLike[str]) -> str:
    """What the manifest calls a checkpoint: a folder's own name or a hub id (of the hub's cache too), never a path."""
    if not Path(model).is_dir():
        return str(model)
    cached = _HUB_CACHE.search(Path(model).resolve().as_posix())
    return cached[1].replace("--", "/") if cached else Path(model).resolve().name


def base_of(model: str | os.PathLike[str]) -> dict[str, str]:
    """`base`, for the manifest: a local folder's model by the name that the hub's cache or a config gives it; nothing
    for a hub id, which is the name already."""
    folder = Path(model)
    if not folder.is_dir():
        return {}
    for file in _CONFIGS:
        with contextlib.suppress(OnnxLoraError):
            fields = read_json(folder / file, ModelError)
            if _name_in(fields):
                return base_of_fields(folder, fields)
    return base_of_fields(folder, {})


def base_of_fields(model: str | os.PathLike[str], fields: Mapping[str, Any]) -> dict[str, str]:
    """`base`, as `base_of` gives it, from the fields of a config that was read already."""
    folder = Path(model)
    if not folder.is_dir():
        return {}
    cached = _HUB_CACHE.search(folder.resolve().as_posix())
    if cached:
        return {"base": cached[1].replace("--", "/")}
    named = _name_in(fields)
    return {"base": short_name(named)} if named else {}


def short_name(named: str) -> str:
    """A hub id as it is, and of a path the last component: nothing of the machine that made it."""
    path = PurePosixPath(named.replace("\\", "/"))
    is_id = len(path.parts) <= 2 and not path.is_absolute() and path.parts[0] not in (".", "..", "~")
    return str(path) if is_id else path.name


def _name_in(fields: Mapping[str, Any]) -> str:
    """The name that a config gives to its model, or nothing."""
    named = fields.get(_NAME)
    return named if isinstance(named, str) else ""
