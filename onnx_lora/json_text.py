"""JSON text that somebody else wrote: bounded before it is parsed, and refused with the caller's own error. It knows no
file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from onnx_lora.errors import InputError

__all__ = ["parse_json"]

# JSON of as many values is 200 MB of Python's objects. The header of 130,000 tensors, a pair for each expert of the
# largest mixtures, has half of them.
_MOST_VALUES = 2_000_000

# Every whole number of so many digits has a float; the largest float has 309.
_DIGITS = 300

_GET_AGAIN = "correct it, or get it again"


def parse_json(
    text: bytes, path: Path, kind: type[InputError], *, what: str, names_once: bool = False
) -> dict[str, Any]:
    """A JSON object, without numbers that no float holds and without halves of characters.

    `names_once`: a name that comes twice in an object is damage; else the last one counts, as everywhere in Python.

    Raises `kind`: `what` is damaged, too large, or another kind of JSON. `path` stands in the error.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise kind(f"{what} must hold at most {_MOST_VALUES} values, and holds more", path=path)
    try:
        pairs_hook = _refuse_repeated if names_once else None
        data = json.loads(text.decode("utf-8"), parse_int=_parse_integer, object_pairs_hook=pairs_hook)
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


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError: a name comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:80]!r} comes twice")
            seen.add(name)
    return found
