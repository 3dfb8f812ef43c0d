"""A Hugging Face checkpoint, exported by Optimum (TorchScript) for any task that it knows."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.errors import ModelError
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.companion_files import companions_of
from onnx_lora.exporter.frontends.configs.model_config import ModelConfig
from onnx_lora.exporter.frontends.configs.whole import LOADING, check_whole
from onnx_lora.exporter.frontends.exporters.optimum_references import reference_of
from onnx_lora.exporter.frontends.exporters.optimum_tasks import explain_task
from onnx_lora.exporter.frontends.exporters.registry import ExportRequest, Refusal
from onnx_lora.exporter.frontends.failures import library_failures
from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.frontends.quiet import quiet, quiet_imports, without_bars
from onnx_lora.exporter.frontends.source import Loaded, Original, Reference
from onnx_lora.exporter.frontends.unfused import without_norm_fusion
from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.exporter.ort_check import open_graph
from onnx_lora.exporter.request import GraphFile
from onnx_lora.exporter.weights.torch_weights import read_module_weights

if TYPE_CHECKING:
    from torch import nn

    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package

__all__ = ["EXPORTER", "OptimumExporter", "load_model", "references"]

# What Optimum puts behind a task whose graphs have a cache.
_WITH_PAST = "-with-past"


class OptimumExporter:
    """Optimum's ONNX export of transformers' models."""

    name = "optimum"

    def accepts(self, request: ExportRequest) -> Refusal | None:
        """It takes every checkpoint in floats; what it cannot export, it says when it loads it."""
        if request.precision.quantized:
            return Refusal(f'Optimum writes no {request.precision.name}: the GenAI builder does, with `via="genai"`')
        problem = explain_task(request.task, request.config.fields)
        return None if problem is None else Refusal(problem)

    def load(self, request: ExportRequest, folder: Path, progress: Progress) -> Loaded:  # noqa: ARG002 - it tells none
        """Write Optimum's ONNX files into `folder`.

        Raises ModelError: no such checkpoint, or Optimum does not export it for this task. ExportError:
        the exporter failed. MissingDependencyError: torch or optimum-onnx is not installed.
        """
        config = request.config
        model, task, untrained = _load(config, request.task, request.precision.name)
        with quiet(), library_failures(config.model, _export_for(task)), without_norm_fusion():
            from optimum.exporters.onnx import onnx_export_from_model

            onnx_export_from_model(model, folder, task=task, no_post_process=True, do_validation=False)
        with library_failures(config.model, f"run for task {task!r}"):
            calls = count_calls(model, {part.graph: part.answer for part in references(model, task)})
        graphs: list[GraphFile] = []
        for file in sorted(folder.glob("*.onnx")):
            # A graph that no reference stands behind gets no points: nothing tells what it calls.
            graphs.append(GraphFile(file.stem, file, calls=calls.get(file.stem, Calls({}))))
        record = {"made_by": self.name, "from": config.name, "task": task, "precision": request.precision.name}
        return Loaded(
            graphs=tuple(graphs),
            record=record | config.base,
            weights=read_module_weights(model, heads=heads_of(model)),
            companions=_companions(config, folder),
            scratch=folder,
            original=Original(model, partial(references, model, task)),
            untrained=untrained,
        )

    def load_original(self, request: ExportRequest, package: Package) -> Original:
        """The torch model that Optimum would export. Where no task is told, a decoder has its cache if the package's
        graphs have one. Raises ModelError, MissingDependencyError."""
        model, task, _ = _load(request.config, request.task, request.precision.name)
        if request.task is None and task.endswith(_WITH_PAST) and not _has_cache(package):
            task = task.removesuffix(_WITH_PAST)
            model.config.use_cache = False
        return Original(model, partial(references, model, task))


EXPORTER = OptimumExporter()


def load_model(model: str | os.PathLike[str], *, task: str | None, precision: str = "fp32") -> tuple[nn.Module, str]:
    """The torch model that Optimum would export, and the task it would export it for.

    Decoders get their cache ("-with-past") unless `task` says otherwise.

    Raises ModelError: no such checkpoint, or Optimum does not export it for this task. MissingDependencyError.
    """
    loaded, chosen, _ = _load(ModelConfig.read(model), task, precision)
    return loaded, chosen


def _load(config: ModelConfig, task: str | None, precision: str) -> tuple[Any, str, tuple[str, ...] | None]:
    """The model, its task, and its parameters that the checkpoint lacks; None: its library does not tell."""
    # Optimum looks for diffusers, which notes what else is installed.
    with quiet(), quiet_imports(), library_failures(config.model, _export_for(task)):
        import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
        import torch
        from optimum.exporters.tasks import TasksManager
    failures = library_failures(config.model, _export_for(task))
    with quiet(), failures, without_bars(), config.open_readable() as read:
        library = TasksManager.infer_library_from_model(str(read))
        if library == "sentence_transformers":
            # The same transformer in the same files; pooling is arithmetic without weights, and stays outside.
            library = "transformers"
        options = {
            "torch_dtype": torch.float16 if precision == "fp16" else torch.float32,
            "local_files_only": Path(read).is_dir(),
            "trust_remote_code": False,
        }
        untrained: tuple[str, ...] | None = None
        theirs = _read_their_config(read) if library == "transformers" else None
        chosen = TasksManager.map_from_synonym(task or _task_of(config, read, library, theirs))
        if theirs is not None:
            kind = _class_for(chosen, theirs)
            loaded, account = kind.from_pretrained(str(read), **options, **LOADING)
            untrained = check_whole(loaded, account, config.model, read)
        else:
            loaded = TasksManager.get_model_from_task(
                chosen, str(read), framework="pt", library_name=library, **options
            )
        chosen = _settle_task(loaded, chosen, library, config, is_given=task is not None)
    return loaded.eval(), chosen, untrained


def _read_their_config(read: str | os.PathLike[str]) -> Any:
    """transformers' own object of a checkpoint's config, already in the words of the installed version."""
    import transformers

    is_local = Path(read).is_dir()
    return transformers.AutoConfig.from_pretrained(str(read), local_files_only=is_local, trust_remote_code=False)


def _task_of(config: ModelConfig, read: str | os.PathLike[str], library: str, theirs: Any) -> str:
    """What a checkpoint is for: by the class its config names, else by what the hub says of it."""
    from optimum.exporters.tasks import TasksManager

    if theirs is not None:
        import transformers

        for name in theirs.architectures or ():
            if hasattr(transformers, name):
                return str(TasksManager.infer_task_from_model(getattr(transformers, name)))
    if Path(read).is_dir():
        raise ModelError("its config.json names no class of transformers, so the task must be given", path=config.model)
    return str(TasksManager.infer_task_from_model(str(read), library_name=library))


def _class_for(task: str, theirs: Any) -> Any:
    """The class that Optimum loads a checkpoint with."""
    from optimum.exporters.tasks import TasksManager

    named = None
    if task == "reinforcement-learning" and theirs.architectures:
        named = theirs.architectures[0]
    return TasksManager.get_model_class_for_task(task, "pt", model_type=theirs.model_type, model_class_name=named)


def _settle_task(model: Any, task: str, library: str, config: ModelConfig, *, is_given: bool) -> str:
    """The task, with a cache where Optimum knows one and the user gave none; the model is told.

    Raises ModelError: Optimum does not export such a model for it.
    """
    from optimum.exporters.tasks import TasksManager

    kind = model.config.model_type
    known = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name=library)
    if not is_given and f"{task}{_WITH_PAST}" in known:
        task = f"{task}{_WITH_PAST}"
    if task not in known:
        raise ModelError(
            f"Optimum exports {kind} for {', '.join(sorted(known))}, and not for {task!r}", path=config.model
        )
    model.config.use_cache = task.endswith(_WITH_PAST)
    if task == "text-classification" and model.config.pad_token_id is None:
        raise ModelError(
            "a classifier must know its padding: set pad_token_id in config.json (0 where inputs are never padded)",
            path=config.model,
        )
    return task


def _has_cache(package: Package) -> bool:
    """Whether a graph takes what an earlier call computed."""
    for graph in package.manifest.graphs:
        for value in open_graph(package.path / graph.file).get_inputs():
            if value.name.startswith("past_key_values"):
                return True
    return False


def references(model: Any, task: str) -> list[Reference]:
    """For every graph that Optimum makes of `model`: inputs, and what the model answers to them."""
    with quiet(), library_failures(type(model).__name__, _export_for(task)):
        import torch
        from optimum.exporters.onnx.utils import _get_submodels_and_onnx_configs

        precision = "fp16" if "float16" in str(model.dtype) else "fp32"
        _, parts = _get_submodels_and_onnx_configs(
            model, task, False, {}, False, "default", "transformers", float_dtype=precision
        )
        # The same inputs every time, and the caller's random numbers left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [reference_of(name, part, config) for name, (part, config) in parts.items()]


def _companions(config: ModelConfig, folder: Path) -> tuple[Path, ...]:
    """Optimum's files, and those of a local checkpoint that it left out."""
    files = {file.name: file for file in companions_of(folder)}
    if config.is_local:
        for file in companions_of(Path(config.model)):
            files.setdefault(file.name, file)
    return tuple(files.values())


def _export_for(task: str | None) -> str:
    """What Optimum does with a checkpoint, for messages: "cannot be ..."."""
    return f"exported by Optimum for task {task!r}" if task else "exported by Optimum"
