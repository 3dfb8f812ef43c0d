"""What several commands take, and how it is read: options, adapters with weights, files of arrays."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
import numpy as np

from onnx_lora.boundary import translate_unread
from onnx_lora.errors import FeedError, InputError
from onnx_lora.staging import staged_place

try:
    from lzma import LZMAError
except ImportError:  # this Python was built without lzma, and its archives are refused as unknown
    LZMAError = zipfile.BadZipFile  # type: ignore[misc, assignment]

__all__ = [
    "choose_adapters",
    "json_option",
    "new_output",
    "parse_named",
    "parse_weighted",
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


def parse_named(adapters: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """Paths and weights by name, of texts like `NAME=PATH:WEIGHT`."""
    parts = {}
    for text in adapters:
        name, equals, place = text.partition("=")
        if not equals or not name or not place:
            raise click.UsageError(f"--adapter must look like NAME=PATH or NAME=PATH:WEIGHT, and is {text!r}")
        if name in parts:
            raise click.UsageError(f"--adapter must name every adapter differently, and names {name!r} twice")
        parts[name] = parse_weighted(place)
    return parts


def choose_adapters(parts: Mapping[str, tuple[Path, float]], rows: str | None) -> Any:
    """What `--adapter` and `--rows` ask for together."""
    weights = {name: weight for name, (_, weight) in parts.items()}
    if rows is None:
        return weights or None
    names = [row.strip() for row in rows.split(",")]
    return [None if name == "-" else {name: weights.get(name, 1.0)} for name in names]


def parse_weighted(text: str) -> tuple[Path, float]:
    """`PATH` or `PATH:WEIGHT`. What follows the last colon is a weight only if it is a number."""
    place, colon, weight = text.rpartition(":")
    if colon and place:
        try:
            return Path(place), float(weight)
        except ValueError:
            if not Path(text).exists():
                raise InputError(
                    f"--adapter must hold PATH or PATH:WEIGHT; {weight!r} is not a weight, and {text!r} is no path"
                ) from None
    return Path(text), 1.0


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


@contextmanager
def new_output(path: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """What `staged_place` gives, for a path that ends as it must. Raises InputError: it does not."""
    if path.suffix not in suffixes:
        raise InputError(f"the output must end with {' or '.join(suffixes)}", path=path)
    with staged_place(path) as place:
        yield place
