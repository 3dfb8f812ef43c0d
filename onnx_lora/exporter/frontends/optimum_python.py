"""Where Optimum is: in this Python, or in another one that the user names. Its ONNX half needs transformers 4, which
cannot be installed beside 5."""

from __future__ import annotations

import os
from importlib import metadata

from onnx_lora.exporter.frontends.exporters.registry import Refusal

__all__ = ["VARIABLE", "no_optimum", "optimum_python"]

# The environment variable that names the other Python.
VARIABLE = "ONNX_LORA_OPTIMUM_PYTHON"

_HOW = (
    "python -m venv ~/optimum && ~/optimum/bin/pip install 'onnx-lora[diffusion,cpu]' && "
    f"export {VARIABLE}=~/optimum/bin/python (in a clone of onnx-lora: make setup-optimum)"
)


def optimum_python() -> str | None:
    """The Python to call Optimum in; None: this one. Raises MissingDependencyError: no Python has it."""
    refusal = no_optimum()
    if refusal is not None:
        raise refusal.as_error("")
    return None if _is_here() else os.environ[VARIABLE]


def no_optimum() -> Refusal | None:
    """Why Optimum cannot be called, or None."""
    if _is_here() or os.environ.get(VARIABLE):
        return None
    return Refusal("Optimum needs transformers 4, and so an environment of its own beside transformers 5", _HOW)


def _is_here() -> bool:
    try:
        metadata.version("optimum-onnx")
    except metadata.PackageNotFoundError:
        return False
    return True
