"""Opening an adapter's files: what must hold of any file before its format is looked at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["opened", "parse_json", "sha256_of", "shown", "widened_bfloat16"]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading. Raises AdapterFileError: none, not regular, or not readable."""
    try:
        if not path.is_file():
            raise AdapterFileError("must be a file, and there is none", path=path)
        with path.open("rb") as file:
            yield file
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"cannot be read: {error}", path=path) from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: bytes, path: Path, *, what: str) -> dict[str, Any]:
    """A JSON object. Raises AdapterFileError: `what` is damaged, or another kind of JSON."""
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{what} must be JSON, and is damaged: {error}", path=path) from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"{what} must be a JSON object, not {type(data).__name__}", path=path)
    return data


def widened_bfloat16(bits: Array) -> Array:
    """bfloat16, held as 16-bit integers, as float32: exact, since it is float32's upper half."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def shown(value: object) -> str:
    """A value out of a file, short enough for a message."""
    return repr(value)[:80]
