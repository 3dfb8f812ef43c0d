"""What a run of the tests makes once, however many processes it has: checkpoints and exports, seconds each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

__all__ = ["made_once"]


def made_once(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this run, shared by its processes, that the first to ask for it makes: `make(folder)`, of a
    folder that does not exist yet. Tests must not write in it.

    A `make` that fails is tried again by the next.
    """
    base = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of pytest-xdist's run, whose processes have a folder each
    shared = base / "once"
    shared.mkdir(exist_ok=True)
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a make that failed left
            make(folder)
            done.touch()
    return folder
