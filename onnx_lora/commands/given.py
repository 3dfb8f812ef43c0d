"""Adapters as every command takes them: `[NAME=]PATH[:WEIGHT]`, read in one place.

A path that exists as it stands is that path, whatever it holds. Else NAME is what stands before the first `=`, if it
holds no `/`, no backslash and no `:`; and WEIGHT is what follows the last `:`, if it is a number. So a drive's
letter is a path's, and `./x=y` is a path even where there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from onnx_lora.adapters import Adapter, read_adapter
from onnx_lora.errors import InputError

__all__ = [
    "SPELLING",
    "GivenAdapter",
    "adapter_name_option",
    "by_label",
    "choose_adapters",
    "parse_adapter",
    "parse_adapters",
]

P = ParamSpec("P")
R = TypeVar("R")

# What help texts call it.
SPELLING = "[NAME=]PATH[:WEIGHT]"

_DRIVE = re.compile(r"[A-Za-z]:[/\\][^:]*$")
_NAME = re.compile(r"[^/\\:=]+")


@dataclass(frozen=True)
class GivenAdapter:
    """An adapter as it was spelled. `chosen`: the one of several in its file or folder, by `--adapter-name`."""

    path: Path
    weight: float = 1.0
    name: str | None = None
    chosen: str | None = None

    @property
    def label(self) -> str:
        """What the command calls it: its name, or that of its folder or file."""
        if self.name is not None:
            return self.name
        if self.chosen is not None:
            return self.chosen
        place = self.path.resolve()
        return place.name if place.is_dir() else place.stem

    def read(self, initial: Path | None = None) -> Adapter:
        """The adapter. Where its file or folder holds several, the chosen one, or that of its name."""
        return read_adapter(self.path, name=self.chosen or self.name, initial=initial)


def adapter_name_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--adapter-name`, as `parse_adapters` takes it."""
    text = "Which one, where the adapter's file or folder holds several."
    return click.option("--adapter-name", metavar="NAME", help=text)(command)


def parse_adapters(texts: Sequence[str], adapter_name: str | None = None) -> list[GivenAdapter]:
    """The adapters of a command. Raises UsageError: `adapter_name`, and several to which it may belong."""
    given = [parse_adapter(text) for text in texts]
    if adapter_name is None:
        return given
    if len(given) != 1:
        raise click.UsageError(
            "--adapter-name chooses within one adapter's file; of several give each its name: NAME=PATH"
        )
    return [replace(given[0], chosen=adapter_name)]


def parse_adapter(text: str) -> GivenAdapter:
    """What `[NAME=]PATH[:WEIGHT]` says. Raises InputError: a weight that is no number, behind what is no path."""
    if not text:
        raise InputError(f"an adapter must be given as {SPELLING}, and is empty")
    if _exists(text):
        return GivenAdapter(Path(text))
    name, equals, rest = text.partition("=")
    if equals and _NAME.fullmatch(name):
        if not rest:
            raise InputError(f"an adapter must be given as {SPELLING}, and {text!r} has no path")
        return replace(_parse_place(rest), name=name)
    return _parse_place(text)


def _parse_place(text: str) -> GivenAdapter:
    """What `PATH[:WEIGHT]` says."""
    place, colon, weight = text.rpartition(":")
    if _exists(text) or not colon or not place:
        return GivenAdapter(Path(text))
    try:
        number = float(weight)
    except ValueError:
        if _DRIVE.match(text):
            return GivenAdapter(Path(text))
        raise InputError(
            f"an adapter must be given as {SPELLING}; {weight!r} is not a weight, and {text!r} is no path"
        ) from None
    if not math.isfinite(number):
        raise InputError(f"a weight must be a finite number, and is {weight!r}")
    return GivenAdapter(Path(place), number)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def by_label(given: Sequence[GivenAdapter]) -> dict[str, GivenAdapter]:
    """The adapters by what they are called. Raises UsageError: two are called the same."""
    found: dict[str, GivenAdapter] = {}
    for one in given:
        if one.label in found:
            raise click.UsageError(f"two adapters are called {one.label!r}; give them names: NAME=PATH")
        found[one.label] = one
    return found


def choose_adapters(parts: Mapping[str, GivenAdapter], rows: str | None) -> Any:
    """What `--adapter` and `--rows` ask for together."""
    weights = {name: given.weight for name, given in parts.items()}
    if rows is None:
        return weights or None
    names = [row.strip() for row in rows.split(",")]
    return [None if name == "-" else {name: weights.get(name, 1.0)} for name in names]
