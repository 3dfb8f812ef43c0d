"""JSON that somebody else wrote: bounded before it is parsed, and refused with the caller's own error. It knows no
format."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from onnx_lora.boundary import unread
from onnx_lora.errors import InputError

__all__ = ["CONFIG_LIMIT", "parse_json", "read_json"]

# With every module of a large model named in its patterns a config has a few hundred kB.
CONFIG_LIMIT = 16 * 2**20  # bytes

# JSON of as many values is 200 MB of Python's objects. The header of 130,000 tensors, a pair for each expert of the
# largest mixtures, has half of them.
_MOST_VALUES = 2_000_000

# Every whole number of so many digits has a float; the largest float has 309.
_DIGITS = 300

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
        raise unread(error, path, kind, _GET_AGAIN) from error
    if len(text) > limit:
        raise kind(f"too large for {what} (limit {limit} bytes)", path=path)
    return parse_json(text, path, kind, what=what)


def parse_json(text: bytes, path: Path, kind: type[InputError], *, what: str) -> dict[str, Any]:
    """A JSON object, without numbers that no float holds and without halves of characters.

    Raises `kind`: `what` is damaged, too large, or another kind of JSON. `path` stands in the error.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise kind(f"{what} must hold at most {_MOST_VALUES} values, and holds more", path=path)
    try:
        data = json.loads(text.decode("utf-8"), parse_int=_parse_integer)
        if re.search(rb"\\u[dD][89a-fA-F]", text):
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError, MemoryError) as error:
        raise kind(f"{what} must be JSON, and is damaged: {error}; {_GET_AGAIN}", path=path) from error
    if not isinstance(data, dict):
        raise kind(f"{what} must be a JSON object, not {type(data).__name__}; {_GET_AGAIN}", path=path)
    return data


def _parse_integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
