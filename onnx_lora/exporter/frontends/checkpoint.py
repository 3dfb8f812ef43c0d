"""A checkpoint of transformers as a source of graphs. An exporter makes them: the one that the user names, or the first
that takes the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lora.exporter.frontends.configs.model_config import ModelConfig
from onnx_lora.exporter.frontends.exporters.registry import (
    EXPORTERS,
    CheckpointExporter,
    ExportRequest,
    choose_exporter,
    find_exporter,
)
from onnx_lora.exporter.precision import Precision

if TYPE_CHECKING:
    from onnx_lora.exporter.frontends.source import Loaded, Original
    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A model as `save_pretrained` writes it.

    `path`: its folder, or a hub id.
    `task`: what it is exported for, by Optimum's names ("text-classification"). None: what its config says, decoders
        with their cache.
    `via`: the exporter that makes a graph of it: "genai" (ONNX Runtime GenAI's builder; its packages run in
        onnxruntime_genai too), "transformers" or "optimum". None: the builder for the language models it is known to be
        right for, if onnxruntime-genai is installed, and for what only it can write; else transformers, from 5.24 on;
        else Optimum.
    `precision`: "fp32", "fp16", "int8" or "int4", or a `Precision`, which says the size of blocks too.

    Raises ModelError: there is no such precision.
    """

    path: str | os.PathLike[str]
    task: str | None = None
    via: str | None = None
    precision: Precision | str = "fp32"

    def __post_init__(self) -> None:
        if isinstance(self.precision, str):
            object.__setattr__(self, "precision", Precision(self.precision))

    @classmethod
    def of_record(cls, record: Mapping[str, str], checkpoint: str | os.PathLike[str]) -> Checkpoint | None:
        """The checkpoint that a manifest's `record` describes, or None where no exporter of ours made its graphs."""
        made_by = record.get("made_by")
        if made_by not in EXPORTERS:
            return None
        return cls(checkpoint, task=record.get("task"), via=made_by, precision=record.get("precision", "fp32"))

    def choose_exporter(self) -> CheckpointExporter:
        """The exporter that `load` goes to. Raises ModelError, MissingDependencyError: none takes the checkpoint."""
        return choose_exporter(self._request())

    def load(self, folder: Path, progress: Progress) -> Loaded:
        """Let the exporter write graphs into `folder`. Raises ModelError, ExportError, StorageError,
        MissingDependencyError."""
        if self.via is not None:
            find_exporter(self.via)  # refuses a name that is none before anything is read
        return self._exporter(None).load(self._request(), folder, progress)

    def load_original(self, package: Package) -> Original:
        """The model in PyTorch, as the exporter that made `package` reads it. Raises ModelError,
        MissingDependencyError."""
        return self._exporter(package).load_original(self._request(), package)

    def python(self, package: Package | None = None) -> str | None:
        """See `LoadedElsewhere`. Raises ModelError, MissingDependencyError."""
        return self._exporter(package).python()

    def _exporter(self, package: Package | None) -> CheckpointExporter:
        """The one that made the package, or that makes one."""
        made_by = package.manifest.source.get("made_by", "") if package is not None else ""
        return find_exporter(made_by) if made_by in EXPORTERS else self.choose_exporter()

    def _request(self) -> ExportRequest:
        precision = self.precision if isinstance(self.precision, Precision) else Precision(self.precision)
        return ExportRequest(ModelConfig.read(self.path), self.task, precision, self.via)
