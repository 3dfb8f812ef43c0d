"""From a torch checkpoint, a torch module or an ONNX file to a package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.boundary import public
from onnx_lora.companions import check_folder
from onnx_lora.errors import ModelError
from onnx_lora.exporter.build import build
from onnx_lora.exporter.frontends.choice import choose
from onnx_lora.exporter.frontends.diffusion import export_pipeline
from onnx_lora.exporter.frontends.genai import build_checkpoint
from onnx_lora.exporter.frontends.onnx_file import load_onnx
from onnx_lora.exporter.frontends.optimum import export_checkpoint
from onnx_lora.exporter.frontends.source import Loaded, Precision
from onnx_lora.exporter.frontends.torch_module import export_module
from onnx_lora.exporter.options import ALL_LINEAR, HEADS_ONLY, Options, Progress
from onnx_lora.exporter.ort_check import blamed_on_damage
from onnx_lora.package import Package
from onnx_lora.staging import staged

if TYPE_CHECKING:
    import torch

__all__ = ["attach", "export"]


@public
def export(
    model: str | os.PathLike[str] | torch.nn.Module,
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    via: str | None = None,
    precision: str = "fp32",
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
    verify: bool = True,
    progress: Progress = lambda *_: None,
) -> Package:
    """Export a base model to a package: ONNX graphs with LoRA injection points.

    model: a folder as `save_pretrained` writes it or a hub id, exported for `task` (default: what its config
        says, decoders with their cache); or a `torch.nn.Module` with `example_inputs`, exported by `torch.onnx`.
    via: which exporter makes a checkpoint a graph: "genai" (ONNX Runtime GenAI's builder; its packages run in
        onnxruntime_genai too) or "optimum". Default: the builder for the language models it is known to be
        right for, if onnxruntime-genai is installed, and for what only it can write; else Optimum.
    precision: "fp32", "fp16", and from the builder "int8" and "int4": symmetric, in blocks of `block_size`
        inputs (default 32). `accuracy_level`: the arithmetic of quantized products, 4 (the default) for int8,
        which rounds activations too and is the fastest, 1 for float32.
    targets: what gets points, as PEFT's `target_modules`: "all-linear", a regular expression, or names, those of
        embeddings and convolutions too; "all" gives a point to everything that can have one.
    replaceable: whole weights that an adapter may replace, as PEFT's `modules_to_save`, or suffixes of parameters
        ("bias"); by default the heads of classification models, which PEFT always saves.
    default_rank: 1 for execution providers that cannot run rank 0 (DirectML, CoreML).
    dora: whether points take DoRA's scale: one product and one input more at each.
    verify: compare the package with the model in PyTorch, base and with random adapters.

    Raises ModelError, ExportError, VerificationError, OutputExistsError, StorageError,
    MissingDependencyError.
    """
    options = Options.of(targets, replaceable, default_rank, dora=dora)
    kept = Precision.of(precision, block_size=block_size, accuracy_level=accuracy_level)
    with staged(out) as folder, tempfile.TemporaryDirectory(prefix=".onnx_lora.", dir=folder.parent) as scratch:
        progress("export", 0, 1)
        if isinstance(model, str | os.PathLike):
            loaded, module = _exported(model, Path(scratch), via, task, kept, progress)
        else:
            if via is not None or kept != Precision():
                raise ModelError("a torch module is exported as it is: via and precision are for checkpoints")
            module = model
            loaded = export_module(
                model,
                Path(scratch),
                example_inputs=example_inputs,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
            )
        package = build(folder, loaded, options, progress=progress)
        if verify:
            from onnx_lora.exporter.verification import verify_module

            progress("verify", 0, 1)
            verify_module(package, module, loaded.origin.get("task"), example_inputs)
    return Package.open(out)


@public
def attach(
    onnx_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    targets: str | Iterable[str] = ALL_LINEAR,
    replaceable: str | Iterable[str] = HEADS_ONLY,
    default_rank: int = 0,
    dora: bool = False,
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
    options = Options.of(targets, replaceable, default_rank, dora=dora)
    with staged(out) as folder:
        loaded = load_onnx(onnx_file, checkpoint)
        with blamed_on_damage(source.file for source in loaded.sources):
            build(folder, loaded, options, progress=progress)
    return Package.open(out)


def _exported(
    model: str | os.PathLike[str],
    scratch: Path,
    via: str | None,
    task: str | None,
    precision: Precision,
    progress: Progress,
) -> tuple[Loaded, torch.nn.Module]:
    if Path(model).is_dir():
        check_folder(Path(model), ModelError)
    way = choose(model, via=via, task=task, precision=precision)
    if way == "genai":
        return build_checkpoint(model, scratch, precision=precision, progress=progress)
    if way == "diffusion":
        return export_pipeline(model, scratch, task=task, precision=precision, progress=progress)
    return export_checkpoint(model, scratch, task=task, precision=precision)
