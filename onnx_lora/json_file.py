"""Files of JSON that somebody else wrote: bounded before they are read, and refused with the caller's own error. It
knows no format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from onnx_lora.boundary import translate_unread
from onnx_lora.errors import InputError
from onnx_lora.json_text import parse_json

__all__ = ["CONFIG_LIMIT", "read_json"]

# With every module of a large model named in its patterns a config has a few hundred kB.
CONFIG_LIMIT = 16 * 2**20  # bytes

_GET_AGAIN = "correct it, or get it again"


def read_json(
    path: Path, kind: type[InputError], *, what: str = "a config", limit: int = CONFIG_LIMIT
) -> dict[str, Any]:
    """The JSON object of a file; `what` is what the file should be, and `limit` its most bytes.

    Raises `kind`: there is no such file, it is no regular one, is too large, is damaged, or holds another kind of JSON.
    StorageError: the system does not let it be read.
    """
    try:
        if not path.is_file():
            raise kind(f"{what} must be a file, and there is none; {_GET_AGAIN}", path=path)
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            # One byte more shows a file that grows; of a limit alone Python would take so much memory at once.
            text = file.read(min(size, limit) + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise translate_unread(error, path, kind, _GET_AGAIN) from error
    if len(text) > limit:
        raise kind(f"too large for {what} (limit {limit} bytes)", path=path)
    return parse_json(text, path, kind, what=what)
