"""Any `torch.nn.Module` with example inputs as a source of graphs, exported by `torch.onnx` (dynamo)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from onnx_lora.errors import ExportError, MissingDependencyError, ModelError, OnnxLoraError, first_line
from onnx_lora.exporter.foreign_libraries import translate_failures
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.configs.names import short_name
from onnx_lora.exporter.frontends.quiet import quiet
from onnx_lora.exporter.frontends.source import Loaded, Original, Reference
from onnx_lora.exporter.frontends.unfused import without_norm_fusion
from onnx_lora.exporter.request import GraphFile
from onnx_lora.exporter.weights.torch_weights import read_module_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package
    from onnx_lora.points import Array

__all__ = ["TorchModule", "reference"]


@dataclass(frozen=True, eq=False)
class TorchModule:
    """A module of PyTorch, as it is in memory.

    `module`: any `nn.Module`; it is put into evaluation mode.
    `example_inputs`: what it is called with once: a tuple of tensors, or tensors by the names of its arguments.
    `dynamic_shapes`: as `torch.export` takes it. None: axis 0 of every input is the batch.
    `input_names`, `output_names`: the graph's names of them, in order. None: torch's.
    """

    module: nn.Module
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None
    dynamic_shapes: Any = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None

    def load(self, folder: Path, progress: Progress) -> Loaded:  # noqa: ARG002 - it is one step
        """Write the module's graph into `folder`.

        Raises ModelError: no module, no example inputs, or names that are none. ExportError: torch could not trace the
        module. MissingDependencyError: torch is not installed.
        """
        self._check()
        file = folder / "model.onnx"
        with translate_failures(self._as_export_error):
            self._write(file)
        record = {"made_by": "torch.onnx", "from": type(self.module).__name__}
        named = getattr(getattr(self.module, "config", None), "_name_or_path", None)
        if isinstance(named, str) and named:
            record["base"] = short_name(named)
        weights = read_module_weights(self.module, heads=frozenset())
        run = partial(_call, self.module, *self._arguments())
        with translate_failures(self._as_run_error):
            calls = count_calls(self.module, {"model": run})
        return Loaded(
            graphs=(GraphFile("model", file, calls=calls["model"]),),
            record=record,
            weights=weights,
            scratch=folder,
            original=self._original(file),
        )

    def load_original(self, package: Package) -> Original:
        """The module itself. Raises ModelError: it has no example inputs, or is no module."""
        self._check()
        return self._original(package.path / package.graph().file)

    def _original(self, file: Path) -> Original:
        graph = onnx.load(file, load_external_data=False).graph
        outputs = [value.name for value in graph.output]
        return Original(self.module, partial(self._references, outputs))

    def _references(self, outputs: Sequence[str]) -> list[Reference]:
        return [reference(self.module.eval(), outputs, self.example_inputs)]

    def _check(self) -> None:
        """Raises ModelError: a field is not what it must be."""
        if not isinstance(self.example_inputs, Mapping | list | tuple) or not self.example_inputs:
            raise ModelError("exporting a torch module needs example_inputs: a tuple, or a dict of keyword arguments")
        _check_names("input_names", self.input_names)
        _check_names("output_names", self.output_names)
        try:
            import torch
        except ImportError as error:
            raise _missing(error) from error
        if not isinstance(self.module, torch.nn.Module):
            raise ModelError(f"must be a folder, a hub id or a torch.nn.Module, and is a {type(self.module).__name__}")
        positional, keywords = self._arguments()
        for value in (*positional, *keywords.values()):
            if not isinstance(value, torch.Tensor):
                raise ModelError("example_inputs must be tensors")

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _split_arguments(self.example_inputs)

    def _write(self, file: Path) -> None:
        import torch

        positional, keywords = self._arguments()
        dynamic_shapes = self.dynamic_shapes
        if dynamic_shapes is None:
            batch = {0: torch.export.Dim("batch_size")}
            by_name = {name: batch if value.ndim else None for name, value in keywords.items()}
            dynamic_shapes = by_name or tuple(batch if value.ndim else None for value in positional)
        with quiet(), without_norm_fusion():
            torch.onnx.export(
                self.module.eval(),
                positional,
                os.fspath(file),
                kwargs=keywords or None,
                dynamic_shapes=dynamic_shapes,
                input_names=self.input_names,
                output_names=self.output_names,
                dynamo=True,
                external_data=True,
            )

    def _as_export_error(self, error: Exception) -> OnnxLoraError | None:
        if isinstance(error, ImportError):
            return _missing(error)
        if isinstance(error, OSError | MemoryError):
            return None
        return ExportError(f"torch.onnx could not export {type(self.module).__name__}: {first_line(error)}")

    def _as_run_error(self, error: Exception) -> OnnxLoraError | None:
        if isinstance(error, OSError | MemoryError):
            return None
        return ExportError(f"{type(self.module).__name__} does not run on its example_inputs: {first_line(error)}")


def reference(model: nn.Module, outputs: Sequence[str], example_inputs: Any) -> Reference:
    """The example inputs by the graph's names, and what the module answers to them. `outputs`: the graph's names of
    its outputs, in order."""
    positional, keywords = _split_arguments(example_inputs)

    def feeds(names: Sequence[str]) -> dict[str, Array]:
        if set(names) <= set(keywords):
            values = [keywords[name] for name in names]
        else:
            values = [*positional, *keywords.values()]
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    def answer() -> dict[str, Array]:
        flat = list(_flatten(_call(model, positional, keywords)))
        return {name: value.numpy() for name, value in zip(outputs, flat, strict=True)}

    return Reference("model", feeds, answer)


def _split_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with: by position, and by name."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def _call(model: nn.Module, positional: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    import torch

    with torch.inference_mode():
        return model(*positional, **keywords)


def _flatten(answer: Any) -> Iterator[Any]:
    """Tensors in the order in which torch.onnx makes outputs of them."""
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    if isinstance(answer, list | tuple):
        for entry in answer:
            yield from _flatten(entry)
    elif answer is not None:
        yield answer


def _check_names(argument: str, names: Sequence[str] | None) -> None:
    if names is None:
        return
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{argument} must be a list of names")
    if len(set(names)) < len(names):
        raise ModelError(f"{argument} must differ from each other, and are {', '.join(names)}")


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"exporting a torch module needs {error.name or error}: pip install 'onnx-lora[export,cpu]'"
    )
