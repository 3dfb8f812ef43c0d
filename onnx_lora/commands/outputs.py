"""Where a command writes: a free place, or with `--force` the place of what the same command wrote before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from onnx_lora.errors import InputError, OutputExistsError
from onnx_lora.staging import exchanging, staged_place, under_the_name
from onnx_lora.whatis import Thing, what_is

__all__ = ["force_option", "new_file", "output"]

P = ParamSpec("P")
R = TypeVar("R")


def force_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--force`, as `output` takes it."""
    text = "Replace an output of the same kind; it stays until the new one is whole."
    return click.option("--force", is_flag=True, help=text)(command)


@contextmanager
def output(out: Path, *, force: bool, kinds: Sequence[Thing]) -> Iterator[Path]:
    """The place where a command writes `out`: that place itself, or with `force`, where something is there already,
    another one, whose content takes its place when the block ends well.

    kinds: what may be replaced.

    Raises OutputExistsError: there is something else.
    """
    if not force or what_is(out) is Thing.NOTHING:
        yield out
        return
    if what_is(out) not in kinds:
        wanted = " or ".join(kind.value for kind in kinds)
        raise OutputExistsError(f"--force replaces {wanted}, and there is {what_is(out).value}; remove it", path=out)
    with exchanging(out) as place, under_the_name(place, out):
        yield place


@contextmanager
def new_file(path: Path, suffixes: Sequence[str], *, force: bool = False) -> Iterator[Path]:
    """What `output` gives, for a file that a command writes itself and that ends as it must.

    Raises InputError: it does not.
    """
    if path.suffix not in suffixes:
        raise InputError(f"the output must end with {' or '.join(suffixes)}", path=path)
    if force and path.is_file():
        with exchanging(path) as place:
            yield place
        return
    with staged_place(path) as place:
        yield place
