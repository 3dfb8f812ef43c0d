"""What several commands take, and how it is read: options, files of arrays."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
import numpy as np

from onnx_lora.boundary import translate_unread
from onnx_lora.errors import FeedError

try:
    from lzma import LZMAError
except ImportError:  # this Python was built without lzma, and its archives are refused as unknown
    LZMAError = zipfile.BadZipFile  # type: ignore[misc, assignment]

__all__ = [
    "json_option",
    "read_feeds",
    "strict_option",
    "unproven_option",
]

P = ParamSpec("P")
R = TypeVar("R")


# What numpy, and the parts of Python beneath it, raise on an archive that is damaged.
_DAMAGE = (
    LZMAError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def json_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--json`: the result is for machines."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def unproven_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--allow-unproven`, as `Package.open` takes it."""
    return click.option(
        "--allow-unproven",
        is_flag=True,
        help="Take points at which the graph may compute something else than the module; `inspect` shows which.",
    )(command)


def strict_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--strict`, as `bind` takes it."""
    text = "Refuse adapters that name another base than the package's."
    return click.option("--strict", is_flag=True, help=text)(command)


def read_feeds(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an `.npz` file, by name. Raises FeedError: it is none, or damaged."""
    if not path.is_file():
        raise FeedError("there is no such file", path=path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise FeedError("must be an .npz file, of inputs by name, and holds one array", path=path)
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise translate_unread(error, path, FeedError, "give an .npz file") from error
    except _DAMAGE as error:
        raise FeedError(f"must be an .npz file of plain arrays: {error}", path=path) from error
