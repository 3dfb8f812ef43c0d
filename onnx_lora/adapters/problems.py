"""How the problems of an adapter's file are raised and worded: one exception, and the sentences that several places
need. It knows no format, no method and no package."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = ["TensorError", "abbreviate", "finite_problem", "list_first", "type_problem", "value_problems"]

_LONGEST = 80  # characters of a file's value in a message

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST


class TensorError(Exception):
    """Something is wrong with a tensor, with the tensors of a module, or with the bytes that hold them.

    Readers and methods raise it among themselves; its text says what must hold and what was found. Code that knows the
    file's path turns it into an error of `onnx_lora.errors`.
    """


def abbreviate(value: object) -> str:
    """A value out of a file as Python writes it, cut to a length that a message can bear."""
    return _REPR.repr(value)[:_LONGEST]


def list_first(names: Sequence[str], count: int) -> str:
    """The first `count` names, and how many more there are: "a, b and 3 more"."""
    listed = ", ".join(names[:count])
    missing = len(names) - count
    return f"{listed} and {missing} more" if missing > 0 else listed


def type_problem(name: str, values: Array) -> str | None:
    """Why the tensor `name` cannot be computed with: it must be floating point. None: it is."""
    if values.dtype.kind == "f":
        return None
    return f"{name}: must be floating point, and is {values.dtype.name}"


def finite_problem(name: str, values: Array) -> str | None:
    """Why the tensor `name` cannot be applied: its values must be finite. None: they are; whole numbers always are."""
    if values.dtype.kind != "f":
        return None
    finite = int(np.isfinite(values).sum())
    if finite == values.size:
        return None
    return f"{name}: {values.size - finite} of {values.size} values are NaN or infinite; train or save it again"


def value_problems(name: str, values: Array) -> list[str]:
    """Why the tensor `name` cannot be applied: it must be floating point, and finite. Empty: it can."""
    problem = type_problem(name, values) or finite_problem(name, values)
    return [] if problem is None else [problem]
