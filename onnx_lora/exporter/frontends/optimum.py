"""A Hugging Face checkpoint, exported by Optimum (TorchScript) for any task that it knows."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.errors import ModelError
from onnx_lora.exporter.calls import Calls
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.huggingface import base_of, heads_of, name_of, quiet, translated, without_bars
from onnx_lora.exporter.frontends.newer import readable
from onnx_lora.exporter.frontends.source import Loaded, Precision, Reference, companions_of
from onnx_lora.exporter.frontends.whole import LOADING, check_whole
from onnx_lora.exporter.graph_files import GraphFile
from onnx_lora.points import Array

if TYPE_CHECKING:
    from torch import nn

__all__ = ["export_checkpoint", "load_model", "reference_of", "references", "without_cache"]


def export_checkpoint(
    model: str | os.PathLike[str], folder: Path, *, task: str | None, precision: Precision
) -> tuple[Loaded, nn.Module]:
    """Write Optimum's ONNX files of a local folder or a hub id into `folder`.

    Raises ModelError: no such checkpoint, or Optimum does not export it for this task. ExportError:
    the exporter failed. MissingDependencyError: torch or optimum-onnx is not installed.
    """
    torch_model, task = load_model(model, task=task, precision=precision.name)
    with quiet(), translated(model, _exported(task)):
        from optimum.exporters.onnx import onnx_export_from_model

        onnx_export_from_model(torch_model, folder, task=task, no_post_process=True, do_validation=False)
    files = sorted(folder.glob("*.onnx"))
    with translated(model, f"run for task {task!r}"):
        calls = count_calls(torch_model, {part.graph: part.answer for part in references(torch_model, task)})
    # A graph that no reference stands behind gets no points: nothing tells what it calls.
    sources = tuple(GraphFile(file.stem, file, calls=calls.get(file.stem, Calls({}))) for file in files)
    checkpoint = Checkpoint.of_module(torch_model, heads=heads_of(torch_model))
    local = Path(model)
    companions = {file.name: file for file in companions_of(folder)}
    if local.is_dir():
        companions |= {file.name: file for file in companions_of(local) if file.name not in companions}
    origin = {"made_by": "optimum", "from": name_of(model), "task": task, "precision": precision.name} | base_of(model)
    return Loaded(sources, origin, checkpoint, tuple(companions.values()), folder), torch_model


def load_model(model: str | os.PathLike[str], *, task: str | None, precision: str = "fp32") -> tuple[nn.Module, str]:
    """The torch model that Optimum would export, and the task it would export it for.

    Decoders get their cache ("-with-past") unless `task` says otherwise.
    """
    with translated(model, _exported(task)):
        import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
        import torch
        from optimum.exporters.tasks import TasksManager
    with quiet(), translated(model, _exported(task)), without_bars(), readable(model) as read:
        library = TasksManager.infer_library_from_model(str(read))
        if library == "sentence_transformers":
            # The same transformer in the same files; pooling is arithmetic without weights, and stays outside.
            library = "transformers"
        chosen = task or _task_of(read, library)
        chosen = TasksManager.map_from_synonym(chosen)
        options = {
            "torch_dtype": torch.float16 if precision == "fp16" else torch.float32,
            "local_files_only": Path(read).is_dir(),
            "trust_remote_code": False,
        }
        if library == "transformers":
            loaded, account = _class_for(chosen, read).from_pretrained(str(read), **options, **LOADING)
            check_whole(loaded, account, model, read)
        else:
            loaded = TasksManager.get_model_from_task(
                chosen, str(read), framework="pt", library_name=library, **options
            )
        known = TasksManager.get_supported_tasks_for_model_type(loaded.config.model_type, "onnx", library_name=library)
        if task is None and f"{chosen}-with-past" in known:
            chosen = f"{chosen}-with-past"
        if chosen not in known:
            raise ModelError(
                f"Optimum exports {loaded.config.model_type} for {', '.join(sorted(known))}, and not for {chosen!r}",
                path=Path(model),
            )
        loaded.config.use_cache = chosen.endswith("-with-past")
        if chosen == "text-classification" and loaded.config.pad_token_id is None:
            raise ModelError(
                "a classifier must know its padding: set pad_token_id in config.json (0 where inputs are never padded)",
                path=Path(model),
            )
    return loaded.eval(), chosen


def _class_for(task: str, model: str | os.PathLike[str]) -> Any:
    """The class that Optimum loads a checkpoint with."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    config = transformers.AutoConfig.from_pretrained(str(model), local_files_only=Path(model).is_dir())
    named = config.architectures[0] if task == "reinforcement-learning" and config.architectures else None
    return TasksManager.get_model_class_for_task(task, "pt", model_type=config.model_type, model_class_name=named)


def _task_of(model: str | os.PathLike[str], library: str) -> str:
    """What a checkpoint is for: by the class its config names, else by what the hub says of it."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    if library == "transformers":
        config = transformers.AutoConfig.from_pretrained(
            str(model), local_files_only=Path(model).is_dir(), trust_remote_code=False
        )
        for name in config.architectures or ():
            if hasattr(transformers, name):
                return str(TasksManager.infer_task_from_model(getattr(transformers, name)))
    if Path(model).is_dir():
        raise ModelError("its config.json names no class of transformers, so the task must be given", path=model)
    return str(TasksManager.infer_task_from_model(str(model), library_name=library))


def without_cache(model: Any) -> None:
    """Let a decoder that was loaded with its cache compute without."""
    model.config.use_cache = False


def references(model: Any, task: str) -> list[Reference]:
    """For every graph that Optimum makes of `model`: inputs, and what the model answers to them."""
    with quiet(), translated(type(model).__name__, _exported(task)):
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


def reference_of(name: str, part: Any, config: Any) -> Reference:
    """Inputs for one of Optimum's graphs, and what the module behind it answers to them."""
    inputs = {key: _little_masked(key, value) for key, value in config.generate_dummy_inputs(framework="pt").items()}

    def answer() -> dict[str, Array]:
        import torch

        # Models write into their cache: every run gets a fresh copy.
        arguments = config.rename_ambiguous_inputs(copy.deepcopy(inputs))
        with quiet(), config.patch_model_for_export(part), torch.inference_mode():
            outputs = part(**arguments)
        flat: dict[str, Array] = {}
        for key, value in outputs.items():
            onnx_name = config.torch_to_onnx_output_map.get(key, "present" if key == "past_key_values" else key)
            flat.update(_flatten(config, onnx_name, value))
        return flat

    def feeds(names: Sequence[str]) -> dict[str, Array]:
        flat: dict[str, Array] = {}
        for key, value in config.generate_dummy_inputs_for_validation(copy.deepcopy(inputs), list(names)).items():
            flat.update(_flatten(config, key, value))
        return flat

    return Reference(name, feeds, answer)


def _little_masked(name: str, value: Any) -> Any:
    """A mask `[rows, positions]` that leaves most of them; other inputs as they are.

    Optimum masks any number, and all but one often: then attention has nothing to choose from, and what keys and
    queries compute is not seen.
    """
    if not name.endswith("attention_mask") or getattr(value, "ndim", 0) != 2 or value.is_floating_point():
        return value
    few = value.shape[1] // 4
    masked = slice(None, few) if value[-1, 0] == 0 else slice(value.shape[1] - few, None)
    mask = value.new_ones(value.shape)
    mask[-1, masked] = 0
    return mask


def _flatten(config: Any, name: str, value: Any) -> dict[str, Array]:
    if isinstance(value, list | tuple):
        value = config.flatten_output_collection_property(name, value)
    if isinstance(value, dict):
        return {key: item.numpy() for key, item in value.items()}
    return {name: value.numpy()}


def _exported(task: str | None) -> str:
    return f"exported by Optimum for task {task!r}" if task else "exported by Optimum"
