"""The kinds of sources, and the one that made a given package. A source is imported when it is first asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from onnx_lora.exporter.frontends.configs.hub import find_revision
from onnx_lora.exporter.frontends.source import LoadedElsewhere
from onnx_lora.lazy import load_object

if TYPE_CHECKING:
    from onnx_lora.exporter.frontends.source import ModelSource, RecordedSource
    from onnx_lora.package import Package

__all__ = ["SOURCES", "python_of", "recorded_source"]

# In this order they are asked whether a manifest describes a package of theirs; the last one takes all that are left.
SOURCES = (
    "onnx_lora.exporter.frontends.pipeline:Pipeline",
    "onnx_lora.exporter.frontends.checkpoint:Checkpoint",
    "onnx_lora.exporter.frontends.onnx_files:OnnxFiles",
)


def python_of(source: ModelSource, package: Package | None = None) -> str | None:
    """The other Python in which a source is loaded, or compared with its `package`; None: this one.

    Raises ModelError: nothing loads it. MissingDependencyError: no Python has what loads it.
    """
    return source.python(package) if isinstance(source, LoadedElsewhere) else None


def recorded_source(record: Mapping[str, str], checkpoint: str | os.PathLike[str]) -> ModelSource:
    """The source that a manifest's `source` describes, with its model at `checkpoint`: a folder or a hub id."""
    for place in SOURCES:
        kind = cast("RecordedSource", load_object(place))
        found = kind.of_record(record, find_revision(checkpoint))
        if found is not None:
            return found
    raise AssertionError("the last kind takes every record")
