"""The boundary between the exporter and the libraries that it hands foreign graphs to: whatever they throw is caught
here, and nowhere else in the exporter. It knows no library."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from onnx_lora.errors import ExportError, ModelError, OnnxLoraError, first_line

__all__ = ["Failure", "attempt", "name_step", "translate_failures"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """What a library threw."""

    error: Exception

    @property
    def line(self) -> str:
        """What it says, in a line; its class where it says nothing."""
        return first_line(self.error)


def attempt(call: Callable[[], T]) -> T | Failure:
    """What a library gives, or that it failed, in whatever way: their exceptions have no common root, and differ from
    version to version. For those who can do without, or know better than the library what is wrong."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - the boundary
        return Failure(error)


@contextmanager
def translate_failures(as_ours: Callable[[Exception], OnnxLoraError | None]) -> Iterator[None]:
    """Around calls of a library: raises what `as_ours` makes of an exception, from it. Where that is None, and where
    the exception is ours already, it stays as it is."""
    try:
        yield
    except OnnxLoraError:
        raise
    except Exception as error:
        ours = as_ours(error)
        if ours is None:
            raise
        raise ours from error


@contextmanager
def name_step(step: str, file: str | os.PathLike[str], *, must: str = "be a sound ONNX graph") -> Iterator[None]:
    """Around one call of a library with what stands in `file`. `step` completes "... failed", and `must` says what the
    file must be.

    Raises ModelError: the library threw something, of whatever class. ExportError: memory ran out. OSError: the disk,
    not the graph.
    """

    def as_ours(error: Exception) -> OnnxLoraError | None:
        if isinstance(error, OSError):
            return None
        if isinstance(error, MemoryError):
            return ExportError(f"{step} failed: memory ran out", path=file)
        return ModelError(f"must {must}, and {step} failed: {first_line(error)}", path=file)

    with translate_failures(as_ours):
        yield
