"""Any `torch.nn.Module` with example inputs, exported by `torch.onnx` (dynamo)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.errors import ExportError, MissingDependencyError, ModelError
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.huggingface import short_name
from onnx_lora.exporter.frontends.source import Loaded, Reference
from onnx_lora.exporter.graph_files import GraphFile
from onnx_lora.points import Array

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["export_module", "reference"]


def export_module(
    model: nn.Module,
    folder: Path,
    *,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None,
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Loaded:
    """Write the module's graph into `folder`. Axis 0 of every input is the batch unless `dynamic_shapes` says more.

    Raises ModelError: no module, no example inputs, or names that are none. ExportError: torch could not trace the
    module.
    """
    if not isinstance(example_inputs, Mapping | list | tuple) or not example_inputs:
        raise ModelError("exporting a torch module needs example_inputs: a tuple, or a dict of keyword arguments")
    _check_names("input_names", input_names)
    _check_names("output_names", output_names)
    keywords = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    positional: tuple[Any, ...] = () if keywords else tuple(example_inputs)
    file = folder / "model.onnx"
    try:
        import torch

        if not isinstance(model, torch.nn.Module):
            raise ModelError(f"must be a folder, a hub id or a torch.nn.Module, and is a {type(model).__name__}")
        if not all(isinstance(value, torch.Tensor) for value in (*positional, *keywords.values())):
            raise ModelError("example_inputs must be tensors")
        batch = torch.export.Dim("batch_size")
        if dynamic_shapes is None:
            by_name = {name: {0: batch} if value.ndim else None for name, value in keywords.items()}
            dynamic_shapes = by_name or tuple({0: batch} if value.ndim else None for value in positional)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(),
                positional,
                os.fspath(file),
                kwargs=keywords or None,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                dynamo=True,
                external_data=True,
            )
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting a torch module needs {error.name}: pip install 'onnx-lora[export,cpu]'"
        ) from error
    except (OSError, MemoryError, ModelError):
        raise
    except Exception as error:  # a foreign exporter on anybody's module
        raise ExportError(f"torch.onnx could not export {type(model).__name__}: {_first_lines(error)}") from error
    checkpoint = Checkpoint.of_module(model, heads=frozenset())
    origin = {"made_by": "torch.onnx", "from": type(model).__name__}
    if isinstance(named := getattr(getattr(model, "config", None), "_name_or_path", None), str) and named:
        origin["base"] = short_name(named)
    try:
        calls = count_calls(model, {"model": partial(_call, model, positional, keywords)})
    except (OSError, MemoryError):
        raise
    except Exception as error:  # anybody's module
        raise ExportError(
            f"{type(model).__name__} does not run on its example_inputs: {_first_lines(error)}"
        ) from error
    return Loaded((GraphFile("model", file, calls=calls["model"]),), origin, checkpoint, scratch=folder)


def _check_names(what: str, names: Sequence[str] | None) -> None:
    if names is None:
        return
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{what} must be a list of names")
    if len(set(names)) < len(names):
        raise ModelError(f"{what} must differ from each other, and are {', '.join(names)}")


def reference(model: nn.Module, outputs: Sequence[str], example_inputs: Any) -> Reference:
    """The example inputs by the graph's names, and what the module answers to them."""
    keywords = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    positional = () if keywords else tuple(example_inputs)

    def feeds(names: Sequence[str]) -> dict[str, Array]:
        values = (
            [keywords[name] for name in names] if set(names) <= set(keywords) else [*positional, *keywords.values()]
        )
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    def answer() -> dict[str, Array]:
        flat = list(_flatten(_call(model, positional, keywords)))
        return {name: value.numpy() for name, value in zip(outputs, flat, strict=True)}

    return Reference("model", feeds, answer)


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


def _first_lines(error: BaseException) -> str:
    """Torch's errors carry pages of advice; the first line and the cause say what is wrong."""
    cause = error.__cause__
    return str(error).strip().split("\n")[0] + (
        f" ({str(cause).strip().splitlines()[0]})" if cause and str(cause) else ""
    )
