"""Models of the hub by their names: `ORG/NAME`, or `ORG/NAME@REVISION`. It asks the hub's own client, which is light,
and loads neither torch nor transformers."""

from __future__ import annotations

import os
import re
from pathlib import Path

from onnx_lora.errors import MissingDependencyError, ModelError, first_line
from onnx_lora.whatis import Thing, explain

__all__ = ["check_name", "fetch_file", "find_revision"]

# What the hub allows: one or two words of letters, digits, `-`, `_` and `.`.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def check_name(model: str | os.PathLike[str]) -> None:
    """Raises ModelError: what lies there is no checkpoint; or nothing does, and the hub has no such names."""
    path = Path(model)
    other = explain(path, Thing.CHECKPOINT)
    if other is not None:
        raise ModelError(f"must be a checkpoint, and {other}", path=model)
    if path.is_file():
        raise ModelError("must be a checkpoint's folder, as save_pretrained writes it, and is a file", path=model)
    if not path.is_dir() and not _ID.fullmatch(str(model)):
        raise ModelError("there is no such folder, and the name is none of the hub's (ORG/NAME)", path=model)


def find_revision(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """What to read of a model: the folder of a revision for `ORG/NAME@REVISION`, anything else as it is. A folder whose
    name has an `@` is that folder.

    Raises ModelError: the hub has no such model or revision. MissingDependencyError.
    """
    name, at, revision = str(model).partition("@")
    if not at or Path(model).exists() or not _ID.fullmatch(name):
        return model
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _missing() from error
    try:
        return snapshot_download(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {name} with a revision {revision!r} could be had from the hub: {first_line(error)}", path=model
        ) from error


def fetch_file(model: str, name: str) -> Path | None:
    """A file of a model of the hub; None: the model has none of this name.

    Raises ModelError: there is no such model, or the hub cannot be asked. MissingDependencyError.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise _missing() from error
    try:
        return Path(hf_hub_download(model, name))
    except (OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ModelError(
            f"there is no such folder, and no model of this name could be had from the hub: {first_line(error)}",
            path=model,
        ) from error


def _missing() -> MissingDependencyError:
    return MissingDependencyError("exporting a checkpoint needs transformers: pip install 'onnx-lora[export,cpu]'")
