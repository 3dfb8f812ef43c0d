"""The boundary between the exporter and the libraries that it hands foreign graphs to: whatever they throw becomes one
of our errors, which names the step and the file. It knows no library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from onnx_lora.errors import ExportError, ModelError, OnnxLoraError, first_line

__all__ = ["foreign"]


@contextmanager
def foreign(step: str, file: str | os.PathLike[str], *, must: str = "be a sound ONNX graph") -> Iterator[None]:
    """Around one call of a foreign library with what stands in `file`. `step` completes "... failed", and `must` says
    what the file must be.

    Raises ModelError: the library threw something, of whatever class: theirs have no common root, and differ from
    version to version. ExportError: memory ran out. OSError: the disk, not the graph.
    """
    try:
        yield
    except (OnnxLoraError, OSError):
        raise
    except MemoryError as error:
        raise ExportError(f"{step} failed: memory ran out", path=file) from error
    except Exception as error:
        raise ModelError(f"must {must}, and {step} failed: {first_line(error)}", path=file) from error
