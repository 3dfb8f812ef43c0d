"""The exporters of checkpoints, and the choice of one where the user named none. An exporter is imported when it is
first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from onnx_lora.errors import MissingDependencyError, ModelError, OnnxLoraError
from onnx_lora.lazy import load_object

if TYPE_CHECKING:
    from onnx_lora.exporter.frontends.configs.model_config import ModelConfig
    from onnx_lora.exporter.frontends.source import Loaded, Original
    from onnx_lora.exporter.precision import Precision
    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package

__all__ = ["EXPORTERS", "CheckpointExporter", "ExportRequest", "Refusal", "choose_exporter", "find_exporter"]

# By the name that `via` and a package's manifest (`made_by`) have for it. The first that takes a checkpoint exports
# it. A new exporter is one file with a `CheckpointExporter`, and one line here.
EXPORTERS: dict[str, str] = {
    "genai": "onnx_lora.exporter.frontends.exporters.genai:EXPORTER",
    "transformers": "onnx_lora.exporter.frontends.exporters.transformers:EXPORTER",
    "optimum": "onnx_lora.exporter.frontends.exporters.optimum:EXPORTER",
}


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What is asked of an exporter: a checkpoint, for a `task` (None: what the checkpoint is for), with weights of a
    precision. `via`: the exporter that the user named, or None."""

    config: ModelConfig
    task: str | None
    precision: Precision
    via: str | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an exporter does not take a checkpoint. `install`: the command after which it would."""

    reason: str
    install: str | None = None

    def as_error(self, path: str) -> OnnxLoraError:
        """ModelError, or MissingDependencyError where something must be installed."""
        if self.install is not None:
            return MissingDependencyError(f"{self.reason}: {self.install}")
        return ModelError(self.reason, path=path)


class CheckpointExporter(Protocol):
    """Makes ONNX files of checkpoints as `save_pretrained` writes them."""

    @property
    def name(self) -> str:
        """What `via` and the manifest call it: its key in EXPORTERS."""
        ...

    def accepts(self, request: ExportRequest) -> Refusal | None:
        """Why it does not take the request, or None. An exporter that the user named refuses only what it cannot do;
        one that was not named also refuses what another one does better."""
        ...

    def python(self) -> str | None:
        """The other interpreter in which it must be called; None: this one."""
        ...

    def load(self, request: ExportRequest, folder: Path, progress: Progress) -> Loaded:
        """Write graphs into `folder`. `Loaded.record["made_by"]` must be `name`; `Loaded.original` must be there.

        Raises ModelError, ExportError, StorageError, MissingDependencyError.
        """
        ...

    def load_original(self, request: ExportRequest, package: Package) -> Original:
        """The model in PyTorch that `package` must reproduce. Raises ModelError, MissingDependencyError."""
        ...


def find_exporter(name: str) -> CheckpointExporter:
    """Raises ModelError: EXPORTERS has no such name."""
    if name not in tuple(EXPORTERS):
        raise ModelError(f"via must be one of {', '.join(EXPORTERS)}, and is {name!r}")
    return cast(CheckpointExporter, load_object(EXPORTERS[name]))


def choose_exporter(request: ExportRequest, among: Sequence[str] = ()) -> CheckpointExporter:
    """The exporter that the user named, else the first that takes the request, `among` some or all.

    Raises ModelError: there is no exporter of that name, or none takes the request. MissingDependencyError: one would
    take it if a library were installed, and no other does.
    """
    path = str(request.config.model)
    if request.via is not None:
        named = find_exporter(request.via)
        refusal = named.accepts(request)
        if refusal is not None:
            raise refusal.as_error(path)
        return named
    refusals: dict[str, Refusal] = {}
    for name in among or EXPORTERS:
        exporter = find_exporter(name)
        refusal = exporter.accepts(request)
        if refusal is None:
            return exporter
        refusals[name] = refusal
    for refusal in refusals.values():
        if refusal.install is not None:
            raise refusal.as_error(path)
    problems = [f"{name}: {refusal.reason}" for name, refusal in refusals.items()]
    raise ModelError("no exporter takes this checkpoint as it is asked for", path=path, problems=problems)
