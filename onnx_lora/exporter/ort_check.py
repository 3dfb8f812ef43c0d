"""ONNX Runtime as the exporter meets it: for trying out graphs that were just made. Its exceptions become ours here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from onnx_lora.errors import ExportError, MissingDependencyError, ModelError, OnnxLoraError
from onnx_lora.exporter.foreign_libraries import Failure, attempt, first_line, translate_failures
from onnx_lora.points import Array

__all__ = ["blamed_on_damage", "check_opens", "native_failures", "open_graph", "run_graph"]

# What ONNX Runtime says of a type or an operator that the CPU has no kernel for, or that a library of the user's
# brings: the graph may still be sound.
_NO_FAULT = ("NOT_IMPLEMENTED", "is not a registered function/op")


def native_failures() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which have no common root; none where it is not installed."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as native
    except ImportError:
        return ()
    return tuple(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception))


def check_opens(file: Path, source: Path) -> None:
    """Raises ModelError: ONNX Runtime refuses `file`, which was made from `source`.

    Nothing is optimised and nothing packed for speed: the weights stay in their file.
    """
    options = _options()
    options.graph_optimization_level = _onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    opened = attempt(lambda: _onnxruntime().InferenceSession(str(file), options, providers=["CPUExecutionProvider"]))
    if not isinstance(opened, Failure):
        return
    said = str(opened.error)
    if any(phrase in said for phrase in _NO_FAULT):
        return
    made = "it" if file == source else f"{file.name}, made from it"
    raise ModelError(f"ONNX Runtime cannot open {made}: {opened.line}", path=source) from opened.error


@contextmanager
def blamed_on_damage(files: Iterable[Path]) -> Iterator[None]:
    """Around what is done with graphs of others, which may be damaged in more ways than anybody asks for.

    Raises ModelError: something went wrong that is no error of ours, and ONNX Runtime refuses one of `files` too. Of
    graphs that it opens the fault is ours, and stays as it is.
    """

    def blame(error: Exception) -> OnnxLoraError | None:
        if not isinstance(error, OSError):
            for file in files:
                check_opens(file, file)
        return None

    with translate_failures(blame):
        yield


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("trying a graph needs onnxruntime: pip install 'onnx-lora[cpu]'") from error
    return onnxruntime


def _options() -> Any:
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = 4  # its errors come back as exceptions
    # Looking for a buffer to reuse, ONNX Runtime compares every value with all those that are free: the square of
    # the number of points.
    options.enable_mem_reuse = False
    return options


def open_graph(file: Path, model: bytes | None = None) -> Any:
    """A plain session on the CPU. `model` is opened in the place of `file`, whose weights it reads.

    Raises MissingDependencyError: no onnxruntime. ExportError: it cannot open the file.
    """
    options = _options()
    if model is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    with _name_failure(file):
        return _onnxruntime().InferenceSession(model or str(file), options, providers=["CPUExecutionProvider"])


def run_graph(session: Any, file: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name. Raises ExportError: the graph cannot run."""
    names = [value.name for value in session.get_outputs()]
    with _name_failure(file):
        return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def _name_failure(file: Path) -> AbstractContextManager[None]:
    """Raises ExportError: ONNX Runtime failed with a graph of ours."""

    def as_ours(error: Exception) -> OnnxLoraError:
        return ExportError(f"ONNX Runtime cannot run the graph that was made: {first_line(error)}", path=file.name)

    return translate_failures(as_ours)
