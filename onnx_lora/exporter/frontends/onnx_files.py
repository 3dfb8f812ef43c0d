"""ONNX files that somebody else exported, as a source of graphs, with or without the checkpoint they were made from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lora.companions import check_folder
from onnx_lora.errors import ModelError
from onnx_lora.exporter.frontends.companion_files import COMPANIONS, companions_of
from onnx_lora.exporter.frontends.configs.model_config import ModelConfig
from onnx_lora.exporter.frontends.configs.names import base_of, name_of
from onnx_lora.exporter.frontends.exporters.registry import CheckpointExporter, ExportRequest, choose_exporter
from onnx_lora.exporter.frontends.source import Loaded
from onnx_lora.exporter.locating.genai_names import GenaiNames
from onnx_lora.exporter.precision import Precision
from onnx_lora.exporter.request import GraphFile
from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeights
from onnx_lora.exporter.weights.safetensors_weights import read_folder_weights
from onnx_lora.whatis import Thing, explain

if TYPE_CHECKING:
    from onnx_lora.exporter.frontends.source import Original
    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package

__all__ = ["OnnxFiles"]

# With whose loading of a checkpoint a graph of unknown make is compared: the first of these that can.
_COMPARED_WITH = ("transformers", "optimum")


@dataclass(frozen=True)
class OnnxFiles:
    """One `.onnx` file, or a folder of them (encoder and decoder, say) that makes one package.

    `path`: the file or the folder. None: it is known no more, and only the checkpoint is.
    `checkpoint`: a folder of safetensors that the graphs were made from: nodes are then told apart by their weights'
        values, not by their names.
    """

    path: str | os.PathLike[str] | None
    checkpoint: str | os.PathLike[str] | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, str], checkpoint: str | os.PathLike[str]) -> OnnxFiles:  # noqa: ARG003
        """The files of a package that no exporter of ours made: somebody's ONNX files, or a torch module's."""
        return cls(None, checkpoint)

    def load(self, folder: Path, progress: Progress) -> Loaded:  # noqa: ARG002 - the graphs are there already
        """The files as they are. Needs no torch.

        Raises ModelError: there is no such file, or no ONNX file in the folder, or no checkpoint.
        """
        if self.path is None:
            raise ModelError("an ONNX file, or a folder of them, must be given")
        path = Path(self.path)
        files = _find_files(path)
        own_folder = path if path.is_dir() else path.parent
        # Of a file's folder only what comes along: it may be anybody's home.
        check_folder(own_folder, ModelError, depth=1, patterns=("*",) if path.is_dir() else COMPANIONS)
        graphs: list[GraphFile] = []
        for file in files:
            name = file.stem if len(files) > 1 or _is_named_in_config(file) else "model"
            if name == "base" or name.startswith("base."):
                raise ModelError(f"{name}.onnx has a name that a package gives its base graph; rename it", path=path)
            graphs.append(GraphFile(name, file))
        weights = None if self.checkpoint is None else _read_weights(Path(self.checkpoint))
        return Loaded(
            graphs=tuple(graphs),
            record={"made_by": "attach", "from": path.name} | self._base(own_folder),
            weights=weights,
            companions=companions_of(own_folder),
            names=GenaiNames.of_folder(own_folder) if weights is None else None,
            # A module with a name has the checkpoint's weights.
            untrained=None if weights is None else (),
        )

    def load_original(self, package: Package) -> Original:
        """The checkpoint's model, as it would be exported for the task that the package names, or that its config does.

        Raises ModelError: no checkpoint was given, or it cannot be read. MissingDependencyError.
        """
        if self.checkpoint is None:
            raise ModelError("ONNX files are compared with a checkpoint in PyTorch, and none was given")
        request = _request_of(package, self.checkpoint)
        return _comparing(request).load_original(request, package)

    def python(self, package: Package | None = None) -> str | None:
        """See `LoadedElsewhere`. The graphs are there already, so that it is asked of a package alone."""
        if package is None or self.checkpoint is None:
            return None
        return _comparing(_request_of(package, self.checkpoint)).python()

    def _base(self, folder: Path) -> dict[str, str]:
        """The model's name: as the configs say, else as the checkpoint's folder is called."""
        if self.checkpoint is None:
            return base_of(folder)
        return {"base": name_of(self.checkpoint)} | base_of(folder) | base_of(self.checkpoint)


def _request_of(package: Package, checkpoint: str | os.PathLike[str]) -> ExportRequest:
    record = package.manifest.source
    precision = Precision(record.get("precision", "fp32"))
    return ExportRequest(ModelConfig.read(checkpoint), record.get("task"), precision)


def _comparing(request: ExportRequest) -> CheckpointExporter:
    """Raises ModelError, MissingDependencyError: none can load the checkpoint."""
    return choose_exporter(request, _COMPARED_WITH)


def _find_files(path: Path) -> list[Path]:
    other = explain(path, Thing.ONNX)
    if other is not None:
        raise ModelError(f"must be an ONNX file, or a folder of them, and {other}", path=path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ModelError("there is no such file", path=path)
    files = sorted(path.glob("*.onnx"))
    if not files:
        raise ModelError("must hold .onnx files, and has none", path=path)
    return files


def _read_weights(folder: Path) -> CheckpointWeights:
    if not folder.is_dir():
        raise ModelError("a checkpoint must be a folder with .safetensors weights", path=folder)
    check_folder(folder, ModelError)
    return read_folder_weights(folder)


def _is_named_in_config(file: Path) -> bool:
    """Whether ONNX Runtime GenAI's config beside it, which goes into the package too, means it by its name."""
    config = file.parent / "genai_config.json"
    try:
        return config.is_file() and f'"{file.name}"' in config.read_text("utf-8")
    except (OSError, ValueError):
        return False
