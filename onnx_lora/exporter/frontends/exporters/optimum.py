"""A Hugging Face checkpoint, exported by Optimum (TorchScript) for any task that it knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
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
from onnx_lora.exporter.frontends.language_part import LanguagePart, find_text_class, language_part_of
from onnx_lora.exporter.frontends.optimum_python import no_optimum, optimum_python
from onnx_lora.exporter.frontends.quiet import quiet, quiet_imports, without_bars
from onnx_lora.exporter.frontends.source import Loaded, Original, Reference
from onnx_lora.exporter.frontends.unfused import without_norm_fusion
from onnx_lora.exporter.frontends.versions import versions_of
from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.exporter.ort_check import takes_cache
from onnx_lora.exporter.request import GraphFile
from onnx_lora.exporter.weights.torch_weights import read_module_weights

if TYPE_CHECKING:
    from torch import nn

    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package

__all__ = ["EXPORTER", "OptimumExporter", "load_model", "references"]

# What Optimum puts behind a task whose graphs have a cache.
_WITH_PAST = "-with-past"

# Optimum's name of transformers.
_LIBRARY = "transformers"

# The tasks for which a model that reads pictures or speech too is exported without those; none: it is given none.
_OF_LANGUAGE_PARTS = (None, "text-generation", "text-generation-with-past")


class OptimumExporter:
    """Optimum's ONNX export of transformers' models."""

    name = "optimum"

    def accepts(self, request: ExportRequest) -> Refusal | None:
        """It takes every checkpoint in floats; what it cannot export, it says when it loads it."""
        if request.precision.quantized:
            return Refusal(f'Optimum writes no {request.precision.name}: the GenAI builder does, with `via="genai"`')
        problem = explain_task(request.task, request.config.fields)
        return no_optimum() if problem is None else Refusal(problem)

    def python(self) -> str | None:
        return optimum_python()

    def load(self, request: ExportRequest, folder: Path, progress: Progress) -> Loaded:  # noqa: ARG002 - it tells none
        """Write Optimum's ONNX files into `folder`.

        Raises ModelError: no such checkpoint, or Optimum does not export it for this task. ExportError:
        the exporter failed. MissingDependencyError: torch or optimum-onnx is not installed.
        """
        config = request.config
        loaded = _load(config, request.task, request.precision.name)
        model, task, part = loaded.model, loaded.task, loaded.part
        with quiet(), library_failures(config.model, _export_for(task)), without_norm_fusion():
            from optimum.exporters.onnx import onnx_export_from_model

            exported = model if part is None else part.model
            onnx_export_from_model(exported, folder, task=task, no_post_process=True, do_validation=False)
        with library_failures(config.model, f"run for task {task!r}"):
            calls = count_calls(model, {case.graph: case.answer for case in references(model, task, part)})
        graphs: list[GraphFile] = []
        for file in sorted(folder.glob("*.onnx")):
            # A graph that no reference stands behind gets no points: nothing tells what it calls.
            graphs.append(GraphFile(file.stem, file, calls=calls.get(file.stem, Calls({}))))
        record = {"made_by": self.name, "from": config.name, "task": task, "precision": request.precision.name}
        record |= versions_of("transformers", "optimum-onnx")
        if part is not None:
            record |= part.as_record(config.name)
        return Loaded(
            graphs=tuple(graphs),
            record=record | config.base,
            weights=read_module_weights(model, heads=heads_of(model)),
            companions=_companions(config, folder),
            scratch=folder,
            original=Original(model, partial(references, model, task, part)),
            untrained=loaded.untrained,
        )

    def load_original(self, request: ExportRequest, package: Package) -> Original:
        """The torch model that Optimum would export. Where no task is told, a decoder has its cache if the package's
        graphs have one. Raises ModelError, MissingDependencyError."""
        loaded = _load(request.config, request.task, request.precision.name)
        task = loaded.task
        if request.task is None and task.endswith(_WITH_PAST) and not takes_cache(package):
            task = task.removesuffix(_WITH_PAST)
            _tell_cache(loaded.model, task)
        return Original(loaded.model, partial(references, loaded.model, task, loaded.part))


EXPORTER = OptimumExporter()


def load_model(model: str | os.PathLike[str], *, task: str | None, precision: str = "fp32") -> tuple[nn.Module, str]:
    """The torch model that Optimum would export, and the task it would export it for.

    Decoders get their cache ("-with-past") unless `task` says otherwise.

    Raises ModelError: no such checkpoint, or Optimum does not export it for this task. MissingDependencyError.
    """
    loaded = _load(ModelConfig.read(model), task, precision)
    return loaded.model, loaded.task


@dataclass(frozen=True, slots=True)
class _Model:
    """A model in PyTorch, and the task that Optimum exports it for. `untrained`: its parameters that the checkpoint
    lacks; None: its library does not tell. `part`: what is exported of it; None: all."""

    model: Any
    task: str
    untrained: tuple[str, ...] | None = None
    part: LanguagePart | None = None


def _load(config: ModelConfig, task: str | None, precision: str) -> _Model:
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
        if library == "transformers":
            return _load_of_transformers(config, task, read, options)
        chosen = TasksManager.map_from_synonym(task or _task_of(config, read, library))
        loaded = TasksManager.get_model_from_task(chosen, str(read), framework="pt", library_name=library, **options)
        chosen = _settle_task(loaded.config, chosen, library, config, is_given=task is not None)
        _tell_cache(loaded, chosen)
    return _Model(loaded.eval(), chosen)


def _load_of_transformers(
    config: ModelConfig, task: str | None, read: str | os.PathLike[str], options: Mapping[str, Any]
) -> _Model:
    """The same of a checkpoint of transformers, whose config tells the task before a weight is read."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    theirs = _read_their_config(read)
    asked = TasksManager.map_from_synonym(task)
    text_class = find_text_class(theirs) if asked in _OF_LANGUAGE_PARTS else None
    if text_class is not None:
        kind = getattr(transformers, theirs.architectures[0])
        loaded, account = kind.from_pretrained(str(read), **options, **LOADING)
        untrained = check_whole(loaded, account, config.model, read)
        part = language_part_of(loaded.eval(), config.model)
        chosen = _settle_task(part.model.config, asked or "text-generation", _LIBRARY, config, is_given=bool(asked))
        _tell_cache(part.model, chosen)
    else:
        part = None
        chosen = asked or _task_of(config, read, _LIBRARY, theirs)
        chosen = _settle_task(theirs, chosen, _LIBRARY, config, is_given=bool(asked))
        loaded, account = _class_for(chosen, theirs).from_pretrained(str(read), **options, **LOADING)
        untrained = check_whole(loaded, account, config.model, read)
    _tell_cache(loaded, chosen)
    return _Model(loaded.eval(), chosen, untrained, part)


def _tell_cache(model: Any, task: str) -> None:
    """Tell a model, and the language model within, whether to give its cache."""
    has_cache = task.endswith(_WITH_PAST)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.use_cache = has_cache


def _read_their_config(read: str | os.PathLike[str]) -> Any:
    """transformers' own object of a checkpoint's config, already in the words of the installed version."""
    import transformers

    is_local = Path(read).is_dir()
    return transformers.AutoConfig.from_pretrained(str(read), local_files_only=is_local, trust_remote_code=False)


def _task_of(config: ModelConfig, read: str | os.PathLike[str], library: str, theirs: Any = None) -> str:
    """What a checkpoint is for: by the class its config names, else by what the hub says of it."""
    from optimum.exporters.tasks import TasksManager

    if theirs is not None:
        import transformers

        for name in theirs.architectures or ():
            if hasattr(transformers, name):
                return _task_of_class(getattr(transformers, name), _known_tasks(theirs.model_type, library, config))
    if Path(read).is_dir():
        raise ModelError("its config.json names no class of transformers, so the task must be given", path=config.model)
    return str(TasksManager.infer_task_from_model(str(read), library_name=library))


def _known_tasks(model_type: str, library: str, config: ModelConfig) -> frozenset[str]:
    """The tasks that Optimum exports a type of models for. Raises ModelError: none."""
    from optimum.exporters.tasks import TasksManager

    try:
        return frozenset(TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name=library))
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"Optimum exports no {model_type}; give an ONNX file to `attach`", path=config.model
        ) from error


def _task_of_class(kind: type, known: frozenset[str]) -> str:
    """What a class of transformers is for: of several tasks the first of those that are `known` to be exported (BART's
    is both a filler of gaps and a translator), else the first."""
    from optimum.exporters.tasks import TasksManager

    for task, classes in TasksManager._TRANSFORMERS_TASKS_TO_MODEL_MAPPINGS.items():
        chosen = TasksManager.map_from_synonym(task)
        # Of some models it has several classes for one task (DeiT's are with a teacher and without).
        names = [name for found in classes.values() for name in ([found] if isinstance(found, str) else found)]
        if kind.__name__ in names and not known.isdisjoint({chosen, f"{chosen}{_WITH_PAST}"}):
            return str(chosen)
    return str(TasksManager.infer_task_from_model(kind))


def _class_for(task: str, theirs: Any) -> Any:
    """The class that Optimum loads a checkpoint with."""
    from optimum.exporters.tasks import TasksManager

    named = None
    if task == "reinforcement-learning" and theirs.architectures:
        named = theirs.architectures[0]
    return TasksManager.get_model_class_for_task(task, "pt", model_type=theirs.model_type, model_class_name=named)


def _settle_task(theirs: Any, task: str, library: str, config: ModelConfig, *, is_given: bool) -> str:
    """The task, with a cache where Optimum knows one and the user gave none.

    Raises ModelError: Optimum does not export such a model for it.
    """
    kind = theirs.model_type
    known = _known_tasks(kind, library, config)
    if not is_given and f"{task}{_WITH_PAST}" in known:
        task = f"{task}{_WITH_PAST}"
    if task not in known:
        raise ModelError(
            f"Optimum exports {kind} for {', '.join(sorted(known))}, and not for {task!r}", path=config.model
        )
    if task == "text-classification" and theirs.pad_token_id is None:
        raise ModelError(
            "a classifier must know its padding: set pad_token_id in config.json (0 where inputs are never padded)",
            path=config.model,
        )
    return task


def references(model: Any, task: str, part: LanguagePart | None = None) -> list[Reference]:
    """For every graph that Optimum makes of `model`: inputs, and what the model answers to them. `part`: what is
    exported of it, which only its graph is like; it is the whole model that answers."""
    with quiet(), library_failures(type(model).__name__, _export_for(task)):
        import torch
        from optimum.exporters.onnx.utils import _get_submodels_and_onnx_configs

        precision = "fp16" if "float16" in str(model.dtype) else "fp32"
        if part is None and find_text_class(model.config) is not None:
            part = language_part_of(model, type(model).__name__)
        exported = model if part is None else part.model
        _, parts = _get_submodels_and_onnx_configs(
            exported, task, False, {}, False, "default", _LIBRARY, float_dtype=precision
        )
        # The same inputs every time, and the caller's random numbers left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found: list[Reference] = []
            for name, (module, config) in parts.items():
                found.append(reference_of(name, module if part is None else model, config))
            return found


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
