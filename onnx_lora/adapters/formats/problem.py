"""The one exception that readers and methods raise among themselves, and values of files as its text shows them. Who
knows the file's path turns it into an error of `onnx_lora.errors`."""

from __future__ import annotations

import reprlib

__all__ = ["TensorError", "shown"]

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80  # characters


class TensorError(Exception):
    """What is wrong with a tensor, with the tensors of a module, or with the bytes that hold them; the text says what
    must hold and what was found."""


def shown(value: object) -> str:
    """A value out of a file, short enough for a message."""
    return _SHOWN.repr(value)[:80]
