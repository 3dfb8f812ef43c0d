"""The boundary between the exporter and the libraries that it hands foreign graphs to: whatever they throw becomes one
of our errors, which names the step and the file. It knows no library."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from onnx_lora.errors import ExportError, ModelError, OnnxLoraError

__all__ = ["first_line", "foreign", "translate"]


@contextmanager
def foreign(step: str, file: str | os.PathLike[str], *, must: str = "be a sound ONNX graph") -> Iterator[None]:
    """Around one call of a foreign library with what stands in `file`. `step` completes "... failed", and `must` says
    what the file must be.

    Raises ModelError: the library threw something, of whatever class: theirs have no common root, and differ from
    version to version. ExportError: memory ran out. OSError: the disk, not the graph.
    """

    def judge(error: Exception) -> Exception:
        if isinstance(error, OSError):
            return error
        if isinstance(error, MemoryError):
            return ExportError(f"{step} failed: memory ran out", path=file)
        return ModelError(f"must {must}, and {step} failed: {first_line(error)}", path=file)

    with translate(judge):
        yield


@contextmanager
def translate(judge: Callable[[Exception], Exception]) -> Iterator[None]:
    """Around calls of a library that may throw anything: what it throws is raised as what `judge` makes of it, or as it
    is where `judge` gives it back. Errors of ours pass."""
    try:
        yield
    except OnnxLoraError:
        raise
    except Exception as error:  # theirs have no common root
        judged = judge(error)
        if judged is error:
            raise
        raise judged from error


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its class where it says nothing."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    said = lines[0] if lines else ""
    return said if len(said) > 8 else f"{type(cause).__name__}: {said}".removesuffix(": ")
