"""From a source of graphs to a package: `export` and `attach`, in full and in their short spellings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.boundary import public
from onnx_lora.errors import ModelError
from onnx_lora.exporter import frontends
from onnx_lora.exporter.build import build
from onnx_lora.exporter.elsewhere import call_in
from onnx_lora.exporter.frontends.configs.hub import find_revision
from onnx_lora.exporter.frontends.early import check_targets
from onnx_lora.exporter.frontends.source import Loaded, ModelSource
from onnx_lora.exporter.frontends.sources import python_of
from onnx_lora.exporter.ort_check import blamed_on_damage
from onnx_lora.exporter.precision import Precision
from onnx_lora.exporter.request import Points, Progress, as_names
from onnx_lora.exporter.sites.targets import ALL_LINEAR, HEADS_ONLY
from onnx_lora.package import Package
from onnx_lora.staging import staged

if TYPE_CHECKING:
    import torch

    from onnx_lora.exporter.verification.comparison import Comparison

__all__ = ["attach", "export"]


@public
def export(
    model: ModelSource | str | os.PathLike[str] | torch.nn.Module,
    out: str | os.PathLike[str],
    *,
    points: Points | None = None,
    verify: bool | None = None,
    progress: Progress = lambda *_: None,
    verified: Callable[[Sequence[Comparison]], object] = lambda _: None,
    task: str | None = None,
    via: str | None = None,
    precision: Precision | str = "fp32",
    block_size: int | None = None,
    accuracy_level: int | None = None,
    targets: str | Iterable[str] = ALL_LINEAR,
    replaceable: str | Iterable[str] = HEADS_ONLY,
    default_rank: int = 0,
    dora: bool = False,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Package:
    """Export a base model to a package: ONNX graphs with LoRA injection points.

    `export(Checkpoint("model", task=...), "package", points=Points(targets=...))` says it in full; the arguments
    behind `verified` are a short spelling of the same: `export("model", "package", task=..., targets=...)`.

    model: a source of graphs: `Checkpoint`, `Pipeline`, `TorchModule`, `OnnxFiles`, or one of your own with the
        methods of `ModelSource`. In short: a folder as `save_pretrained` writes it or a hub id; or a
        `torch.nn.Module` with `example_inputs`.
    out: the package's folder, which must not exist.
    points: which modules get points, and which whole weights may be replaced.
    verify: whether to compare the package with the model in PyTorch, base and with random adapters. None: yes, where
        the source has loaded the model anyway, which all but `OnnxFiles` do.
    progress: called with what is being done, how much of it is done, and how much there is.
    verified: called with what the verification compared, once it agrees.

    In the place of `points`:

    targets, replaceable, default_rank, dora: see `Points`.

    In the place of a `Checkpoint` or a `Pipeline`:

    task, via: see `Checkpoint`.
    precision, block_size, accuracy_level: see `Precision`.

    In the place of a `TorchModule`:

    example_inputs, dynamic_shapes, input_names, output_names: see `TorchModule`.

    Raises ModelError: the model or an option is not what it must be. ExportError: an exporter failed.
    VerificationError: the package does not reproduce the model. OutputExistsError: `out` exists. StorageError: it
    cannot be written. MissingDependencyError: a library that the source needs is not installed.
    """
    wanted = _as_points(points, targets, replaceable, default_rank, dora=dora)
    of_checkpoints = {
        "task": task,
        "via": via,
        "precision": None if precision == "fp32" else precision,
        "block_size": block_size,
        "accuracy_level": accuracy_level,
    }
    of_modules = {
        "example_inputs": example_inputs,
        "dynamic_shapes": dynamic_shapes,
        "input_names": input_names,
        "output_names": output_names,
    }
    source = _as_source(model, _given(of_checkpoints), _given(of_modules))
    return _export(source, out, wanted, verify, progress, verified)


@public
def attach(
    onnx_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    points: Points | None = None,
    targets: str | Iterable[str] = ALL_LINEAR,
    replaceable: str | Iterable[str] = HEADS_ONLY,
    default_rank: int = 0,
    dora: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = lambda *_: None,
) -> Package:
    """Give an ONNX file that somebody else exported its injection points. Needs no torch.

    It is short for `export(OnnxFiles(onnx_file, checkpoint), out, points=..., verify=False)`.

    onnx_file: a file, or a folder of files that make one package. External data files are copied as they
        are, never rewritten.
    out: the package's folder, which must not exist.
    points: which modules get points, and which whole weights may be replaced; `targets`, `replaceable`,
        `default_rank` and `dora` are its fields, for short.
    checkpoint: a folder of safetensors the graph was made from: nodes are then told apart by their
        weights' values, not by their names.
    progress: called with what is being done, how much of it is done, and how much there is.

    Raises ModelError: the file is no sound ONNX graph, or nothing in it can have a point. OutputExistsError: `out`
    exists. StorageError: it cannot be written. MissingDependencyError: a library is not installed.
    """
    wanted = _as_points(points, targets, replaceable, default_rank, dora=dora)
    return _export(frontends.OnnxFiles(onnx_file, checkpoint), out, wanted, False, progress, lambda _: None)


def _export(
    source: ModelSource,
    out: str | os.PathLike[str],
    points: Points,
    verify: bool | None,
    progress: Progress,
    verified: Callable[[Sequence[Comparison]], object],
) -> Package:
    with staged(out) as folder, tempfile.TemporaryDirectory(prefix=".onnx_lora.", dir=folder.parent) as scratch:
        if isinstance(source, frontends.Checkpoint):
            check_targets(source.path, points.targets)
        progress("export", 0, 1)
        given = (folder, Path(scratch), source, points, verify)
        call_in(python_of(source), _fill, *given, progress=progress, verified=verified)
    return Package.open(out)


def _fill(
    folder: Path,
    scratch: Path,
    source: ModelSource,
    points: Points,
    verify: bool | None,
    *,
    progress: Progress,
    verified: Callable[[Sequence[Comparison]], object],
) -> None:
    """Make a package in `folder`, in the Python that the source needs."""
    loaded = source.load(scratch, progress)
    package = _build(folder, loaded, points, progress)
    if verify is None:
        verify = loaded.original is not None
    if verify:
        from onnx_lora.exporter.verification.verify import verify_original

        progress("verify", 0, 1)
        verified(verify_original(package, loaded.original or source.load_original(package)))


def _build(folder: Path, loaded: Loaded, points: Points, progress: Progress) -> Package:
    # Graphs that were not made here may be damaged.
    files = [graph.file for graph in loaded.graphs if loaded.scratch is None]
    with blamed_on_damage(files):
        return build(folder, loaded, points, progress=progress)


def _as_points(
    points: Points | None,
    targets: str | Iterable[str],
    replaceable: str | Iterable[str],
    default_rank: int,
    *,
    dora: bool,
) -> Points:
    short = Points(as_names("targets", targets), as_names("replaceable", replaceable), default_rank, dora)
    if points is None:
        return short
    if not isinstance(points, Points):
        raise ModelError(f"points must be a Points, and is a {type(points).__name__}")
    if short != Points():
        raise ModelError("targets, replaceable, default_rank and dora are fields of points: give them there alone")
    return points


def _as_source(model: Any, of_checkpoints: Mapping[str, Any], of_modules: Mapping[str, Any]) -> ModelSource:
    """The source that `export`'s first argument means, with the options that were given for checkpoints and for torch
    modules.

    Raises ModelError: an option is for another kind of source.
    """
    if isinstance(model, str | os.PathLike):
        if of_modules:
            raise ModelError(f"{_listed(of_modules)}: only for a torch module, and the model is a checkpoint")
        return _as_checkpoint(model, of_checkpoints)
    if isinstance(model, ModelSource) and not isinstance(model, type):
        given = [*of_checkpoints, *of_modules]
        if given:
            raise ModelError(f"{_listed(given)}: must be said by the source, a {type(model).__name__}")
        return model
    if of_checkpoints:
        raise ModelError(
            f"{_listed(of_checkpoints)}: a torch module is exported as it is: via and precision are for checkpoints"
        )
    return frontends.TorchModule(model, **of_modules)


def _as_checkpoint(path: str | os.PathLike[str], options: Mapping[str, Any]) -> ModelSource:
    """A pipeline of diffusers, or a checkpoint of transformers."""
    path = find_revision(path)
    numbers = {name: options[name] for name in ("block_size", "accuracy_level") if name in options}
    precision = options.get("precision", "fp32")
    if not isinstance(precision, Precision):
        precision = Precision(precision, **numbers)
    elif numbers:
        raise ModelError(f"{_listed(numbers)}: must be said by the precision, which is a Precision")
    task, via = options.get("task"), options.get("via")
    if not frontends.is_pipeline(path):
        return frontends.Checkpoint(path, task=task, via=via, precision=precision)
    if via not in (None, "optimum"):
        raise ModelError("a pipeline is exported via Optimum, in fp32 or fp16", path=path)
    return frontends.Pipeline(path, task=task, precision=precision)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
