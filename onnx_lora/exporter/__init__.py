"""From a torch checkpoint, a torch module or an ONNX file to a package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.exporter.build import Options, Progress, build
from onnx_lora.exporter.expose import HEADS_ONLY
from onnx_lora.exporter.frontends.onnx_file import load_onnx
from onnx_lora.exporter.frontends.optimum import export_checkpoint
from onnx_lora.exporter.frontends.source import Loaded
from onnx_lora.exporter.frontends.torch_module import export_module
from onnx_lora.exporter.targets import ALL_LINEAR
from onnx_lora.package import Package, staged

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["attach", "export"]


def export(
    model: str | os.PathLike[str] | nn.Module,
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    dtype: str = "fp32",
    targets: str | Iterable[str] = ALL_LINEAR,
    replaceable: str | Iterable[str] = HEADS_ONLY,
    default_rank: int = 0,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
    progress: Progress = lambda *_: None,
) -> Package:
    """Export a base model to a package: ONNX graphs with LoRA injection points.

    model: a folder as `save_pretrained` writes it or a hub id, exported by Optimum for `task`
        (default: what its config says, decoders with their cache) in `dtype` ("fp32", "fp16"); or a
        `torch.nn.Module` with `example_inputs`, exported by `torch.onnx`.
    targets: what gets points, as PEFT's `target_modules`: "all-linear", a regular expression, or names.
    replaceable: whole weights that an adapter may replace, as PEFT's `modules_to_save`; by default the
        heads of classification models, which PEFT always saves.
    default_rank: 1 for execution providers that cannot run rank 0 (DirectML, CoreML).
    verify: compare the package with the model in PyTorch, base and with random adapters.

    Raises ModelError, ExportError, VerificationError, OutputExistsError, StorageError,
    MissingDependencyError.
    """
    options = Options.of(targets, replaceable, default_rank)
    with staged(out) as folder, tempfile.TemporaryDirectory(prefix=".onnx_lora.", dir=folder.parent) as scratch:
        progress("export", 0, 1)
        if isinstance(model, str | os.PathLike):
            loaded, module = export_checkpoint(model, Path(scratch), task=task, dtype=dtype)
        else:
            module = model
            loaded = export_module(
                model,
                Path(scratch),
                example_inputs=example_inputs,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
            )
        package = _build(folder, loaded, options, progress)
        if verify:
            from onnx_lora.exporter.verify import verify_module

            progress("verify", 0, 1)
            verify_module(package, module, loaded.origin.get("task"), example_inputs)
    return Package.open(out)


def attach(
    onnx_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    targets: str | Iterable[str] = ALL_LINEAR,
    replaceable: str | Iterable[str] = HEADS_ONLY,
    default_rank: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = lambda *_: None,
) -> Package:
    """Give an ONNX file that somebody else exported its injection points. Needs no torch.

    onnx_file: a file, or a folder of files that make one package. External data files are copied as they
        are, never rewritten.
    checkpoint: a folder of safetensors the graph was made from: nodes are then told apart by their
        weights' values, not by their names. For the other arguments see `export`.

    Raises ModelError, OutputExistsError, StorageError, MissingDependencyError.
    """
    options = Options.of(targets, replaceable, default_rank)
    with staged(out) as folder:
        _build(folder, load_onnx(onnx_file, checkpoint), options, progress)
    return Package.open(out)


def _build(folder: Path, loaded: Loaded, options: Options, progress: Progress) -> Package:
    return build(
        folder,
        loaded.sources,
        options=options,
        checkpoint=loaded.checkpoint,
        origin=loaded.origin,
        companions=loaded.companions,
        scratch=loaded.scratch,
        progress=progress,
    )
