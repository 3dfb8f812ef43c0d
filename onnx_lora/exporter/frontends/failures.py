"""Exceptions of Optimum, transformers, diffusers and torch.onnx in our words. It knows their classes, and calls none of
them."""

from __future__ import annotations

import os
import traceback
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from onnx_lora.errors import ExportError, MissingDependencyError, ModelError, OnnxLoraError
from onnx_lora.exporter.foreign_libraries import translate_failures
from onnx_lora.extras import EXTRAS
from onnx_lora.onnxruntime_errors import native_failures

__all__ = ["library_failures"]

# What these libraries raise where a checkpoint is not what it must be.
_OF_INPUT = (OSError, KeyError, ValueError, TypeError, SafetensorError)


def library_failures(model: str | os.PathLike[str], done: str) -> AbstractContextManager[None]:
    """Around calls of a library that reads, loads or exports `model`; `done` completes "cannot be ...".

    Raises MissingDependencyError: it is not installed. ModelError: no such checkpoint, or it cannot be read.
    ExportError: torch.onnx failed, or the library did without saying why. OSError, MemoryError: the machine's.
    """
    return translate_failures(partial(_as_ours, model, done))


def _as_ours(model: str | os.PathLike[str], done: str, error: Exception) -> OnnxLoraError | None:
    if isinstance(error, ImportError):
        extra = EXTRAS.get((error.name or "").partition(".")[0], "export")
        return MissingDependencyError(
            f"exporting a checkpoint needs {error.name or error}: pip install 'onnx-lora[{extra},cpu]'"
        )
    if isinstance(error, MemoryError) or _is_of_the_disk(error):
        return None
    if isinstance(error, _OF_INPUT):
        if Path(model).exists():
            return ModelError(f"cannot be {done}: {error}", path=model)
        # The error itself says what to do; its cause speaks of arguments that nobody here gives.
        said, _, _ = str(error).strip().partition("\n")
        return ModelError(
            f"there is no such folder, and no model of this name could be had from the hub: {said}", path=model
        )
    if isinstance(error, (RuntimeError, *native_failures())):
        return ExportError(
            f"torch.onnx failed, or wrote what ONNX Runtime refuses (in fp16 often: try fp32): {error}", path=model
        )
    if _misses_preprocessor(error, model):
        return ExportError(
            "Optimum takes the size of images from the image processor, and there is none: copy the model's "
            "preprocessor_config.json into the folder",
            path=model,
        )
    said = f"{type(error).__name__}: {error}"
    return ExportError(f"cannot be {done}: a library failed without saying why ({said})", path=model)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether the system refused something that it would not refuse of another model."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)


def _misses_preprocessor(error: Exception, model: str | os.PathLike[str]) -> bool:
    """Whether Optimum failed because it looks for the last of the folder's preprocessors, and there is none."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    looking = Path(innermost.f_code.co_filename).name == "input_generators.py"
    return looking and isinstance(error, IndexError) and not (Path(model) / "preprocessor_config.json").is_file()
