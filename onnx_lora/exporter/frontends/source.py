"""What every source of graphs can do, and what it hands on. It knows no source, and no library."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn

    from onnx_lora.exporter.locating.genai_names import GenaiNames
    from onnx_lora.exporter.request import GraphFile, Progress
    from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeights
    from onnx_lora.package import Package
    from onnx_lora.points import Array

__all__ = ["Loaded", "LoadedElsewhere", "ModelSource", "Original", "Reference"]


@dataclass(frozen=True, slots=True)
class Reference:
    """What one graph must reproduce: inputs for the given names (two rows where it can), and PyTorch's answer by the
    names of the graph's outputs, with the model as it is at that moment.

    `left_out`: the model's inputs for which a graph with inputs of the given names has none. `without`: the same
    reference where the model is not given some of its inputs, which it names as `dropped`; None where it needs all.
    """

    graph: str
    feeds: Callable[[Sequence[str]], dict[str, Array]]
    answer: Callable[[], dict[str, Array]]
    left_out: Callable[[Sequence[str]], tuple[str, ...]] = lambda _: ()
    without: Callable[[Sequence[str]], Reference] | None = None
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Original:
    """The model in PyTorch that a package must reproduce, and for each graph the reference to compare it with."""

    model: nn.Module
    references: Callable[[], list[Reference]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """ONNX files on disk, with what is known about them.

    `record`: what the manifest says of the source. `weights`: the model's, by their torch names. `companions`: files
    that belong to the model and go into the package. Files in `scratch` were made for the package alone, and may be
    moved. `names`: GenAI's table of modules, for graphs without weights to compare. `original`: the model in PyTorch,
    where loading needed it anyway. `untrained`: as in `Manifest`.
    """

    graphs: tuple[GraphFile, ...]
    record: dict[str, str]
    weights: CheckpointWeights | None = None
    companions: tuple[Path, ...] = ()
    scratch: Path | None = None
    names: GenaiNames | None = None
    original: Original | None = None
    untrained: tuple[str, ...] | None = None


@runtime_checkable
class ModelSource(Protocol):
    """Where the graphs of a package come from."""

    def load(self, folder: Path, progress: Progress) -> Loaded:
        """Make graphs on disk, in the empty `folder` where they must be made first.

        Raises ModelError: the source is not what it must be. ExportError: an exporter failed.
        MissingDependencyError: a library that it needs is not installed.
        """
        ...

    def load_original(self, package: Package) -> Original:
        """The model in PyTorch that `package`, which was made from this source, must reproduce.

        Raises ModelError: there is none, or it cannot be read. MissingDependencyError.
        """
        ...


@runtime_checkable
class LoadedElsewhere(Protocol):
    """A source that may have to be loaded in another Python, whose libraries this one cannot have."""

    def python(self, package: Package | None = None) -> str | None:
        """The interpreter in which the graphs are made, or `package` is compared with the model; None: this one."""
        ...


class RecordedSource(Protocol):
    """A kind of source that finds itself in a package's manifest."""

    def of_record(self, record: Mapping[str, str], checkpoint: str | os.PathLike[str]) -> ModelSource | None:
        """The source that a manifest's `record` describes, its model at `checkpoint`; None: it is another kind's."""
        ...
