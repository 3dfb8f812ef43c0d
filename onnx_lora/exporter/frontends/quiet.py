"""Other libraries' notes, warnings and bars, kept out of the user's terminal for as long as a block runs. It restores
every level, handler and bar that it changes."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

__all__ = ["quiet", "quiet_diffusers", "quiet_imports", "quiet_root", "silence_root", "without_bars"]

# Loggers of the exporters, which write of what they do.
_LOGGERS = ("optimum", "transformers", "torch.onnx")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, what is printed, and all that exporters log below errors."""
    before: dict[str, int] = {}
    for name in _LOGGERS:
        before[name] = logging.getLogger(name).level
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing bars for the shards it loads; imports transformers."""
    from transformers.utils import logging as theirs

    with _bars_off(theirs):
        yield


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """`quiet`, and diffusers' notes and bars; imports diffusers."""
    from diffusers.utils import logging as theirs

    level = theirs.get_verbosity()
    with quiet(), _bars_off(theirs):
        try:
            theirs.set_verbosity_error()
            yield
        finally:
            theirs.set_verbosity(level)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide whatever is logged below errors, by whomever: some libraries note at import what else is installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet_root() -> Iterator[None]:
    """Restore the root logger afterwards. ONNX Runtime's quantizers give it a handler and a level when they are
    imported, and log through it; call `silence_root` behind their import."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def silence_root() -> None:
    """Let the root logger pass errors alone. Only within `quiet_root`, which restores it."""
    logging.getLogger().setLevel(logging.ERROR)


@contextmanager
def _bars_off(theirs: Any) -> Iterator[None]:
    """`theirs`: the module `utils.logging` of transformers or diffusers."""
    were_on = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            theirs.enable_progress_bar()
