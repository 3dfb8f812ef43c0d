"""Targets with a bug each: what the fuzzer must find, or it is worth nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from onnx_lora.errors import ModelError
from tests.fuzz.worker import Target

__all__ = ["TARGETS"]

WHOLE = b"a whole file"


def _make(folder: Path) -> None:
    (folder / "only").mkdir()
    (folder / "only" / "file").write_bytes(WHOLE)


def _mutated(bug: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    """The bug shows in mutants that are shorter than the whole; others are refused."""

    def use(folder: Path, out: Path) -> None:
        content = (folder / "file").read_bytes()
        if len(content) < len(WHOLE) - 3:
            bug(out)
        elif content != WHOLE:
            raise ModelError("is no whole file")

    return use


def _throw(out: Path) -> None:
    raise KeyError("foreign")


def _panic(out: Path) -> None:
    raise SystemExit("foreign, and no Exception")


def _loop(out: Path) -> None:
    while True:
        pass


def _die(out: Path) -> None:
    os.abort()


def _allocate(out: Path) -> None:
    # Written, a page at a time: memory that nobody touches is not there.
    block = bytearray(400 * 2**20)
    block[::4096] = b"x" * len(block[::4096])


def _litter(out: Path) -> None:
    (out / ".half").write_bytes(b"")


TARGETS = (
    *(
        Target(bug.__name__, "memory", _make, _mutated(bug))
        for bug in (_throw, _panic, _die, _allocate, _litter, _loop)
    ),
    Target("none", "memory", _make, _mutated(lambda out: None)),
)
