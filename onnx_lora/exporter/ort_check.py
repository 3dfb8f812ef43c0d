"""ONNX Runtime as the exporter meets it: for trying out graphs that were just made. It knows graphs as files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.errors import ExportError, ModelError, OnnxLoraError
from onnx_lora.exporter.foreign_libraries import translate_failures
from onnx_lora.onnxruntime_errors import fail_as, is_unsupported, load_onnxruntime
from onnx_lora.points import Array

if TYPE_CHECKING:
    from onnx_lora.package import Package

__all__ = ["blamed_on_damage", "check_opens", "open_graph", "run_graph", "takes_cache"]


def check_opens(file: Path, source: Path) -> None:
    """Raises ModelError: ONNX Runtime refuses `file`, which was made from `source`.

    Nothing is optimised and nothing packed for speed: the weights stay in their file.
    """
    options = _options()
    options.graph_optimization_level = _onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    made = "it" if file == source else f"{file.name}, made from it"
    try:
        with fail_as(lambda said: ModelError(f"ONNX Runtime cannot open {made}: {said}", path=source)):
            _onnxruntime().InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except ModelError as error:
        # A type or an operator that the CPU has no kernel for, or that a library of the user's brings: the graph may
        # still be sound.
        if error.__cause__ is None or not is_unsupported(error.__cause__):
            raise


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


def takes_cache(package: Package) -> bool:
    """Whether a graph of the package takes what an earlier call computed."""
    for graph in package.manifest.graphs:
        for value in open_graph(package.path / graph.file).get_inputs():
            if value.name.startswith("past_key_values"):
                return True
    return False


def _onnxruntime() -> Any:
    return load_onnxruntime("trying a graph needs")


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
    return fail_as(lambda said: ExportError(f"ONNX Runtime cannot run the graph that was made: {said}", path=file.name))
