"""Whether the arguments of a call are what its annotations say. It knows Python's types, and no function."""

from __future__ import annotations

import builtins
import collections.abc
import dataclasses
import inspect
import math
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

__all__ = ["find_misfits", "is_finite_number"]

# Modules that are imported for checkers alone. They are loaded where there is an object of theirs.
_FOR_CHECKERS = {"torch": "torch", "nn": "torch.nn"}

# Items of a list that are looked at: what is wrong with it is mostly wrong with the first.
_ITEMS = 1000

_LARGE = 10**9  # Python itself refuses to write numbers of many thousand digits

# Containers of one kind of item, which can be looked through without being used up.
_OF_ITEMS = (list, tuple, set, frozenset, str, bytes)


def find_misfits(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """One line for each argument that its annotation does not allow; annotations that mean nothing at run time allow
    everything. Of our own dataclasses (a source of graphs) the fields are judged."""
    signature = inspect.signature(function)
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return []
    problems: list[str] = []
    for name, value in given.items():
        parameter = signature.parameters[name]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = _resolve(parameter.annotation, function)
        if not _fits(value, hint, function):
            written = parameter.annotation if isinstance(parameter.annotation, str) else inspect.formatannotation(hint)
            problems.append(f"{name} must be {written}, and is {_describe_value(value)}")
            continue
        if dataclasses.is_dataclass(value) and type(value).__module__.startswith(f"{__package__}."):
            problems += [f"{name}.{problem}" for problem in _find_misfits_inside(value)]
            continue
        reason = _find_unwritable(value)
        if reason is not None:
            problems.append(f"{name} must be text that can be written, and {reason}")
    return problems


def _find_misfits_inside(record: Any) -> list[str]:
    """As `find_misfits`, of the fields that one of our dataclasses was made with."""
    given = {field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.init}
    return find_misfits(type(record).__init__, (), given)


def is_finite_number(value: object) -> bool:
    """Whether a value is a finite number, of Python's or of numpy's; True and False are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _describe_value(value: object) -> str:
    """An argument's type, and its value where that is short by nature: a foreign `repr` may fail, or never end."""
    if value is None:
        return "None"
    name = type(value).__name__
    is_short = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < _LARGE)
    return f"{name} {value!r}" if is_short else name


def _resolve(annotation: Any, function: Callable[..., Any]) -> Any:
    """What an annotation means, or `Any` where it cannot be told: of types that are imported for checkers alone."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    names = vars(inspect.getmodule(function) or builtins)
    theirs: dict[str, object] = {}
    for name, module in _FOR_CHECKERS.items():
        if module in sys.modules:
            theirs[name] = sys.modules[module]
    try:
        return eval(annotation, names, theirs)  # noqa: S307 - our own source's text
    except (NameError, AttributeError, TypeError):
        return Any


def _fits(value: Any, hint: Any, function: Callable[..., Any]) -> bool:
    if hint is Any or hint is object or isinstance(hint, TypeVar):
        return True
    if hint is None:
        return value is None
    if isinstance(hint, str):
        return _fits(value, _resolve(hint, function), function)
    forward = getattr(hint, "__forward_arg__", None)
    if forward is not None:
        return _fits(value, _resolve(forward, function), function)
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one, function) for one in inside)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inside)
    if origin is collections.abc.Callable:
        return callable(value)
    kind = origin or hint
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _is_float(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is os.PathLike:
        return isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    if not isinstance(kind, type):
        return True
    try:
        if not isinstance(value, kind):
            return False
    except TypeError:  # a protocol that cannot be asked at run time
        return True
    return _items_fit(value, inside, function)


def _is_float(value: Real) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _items_fit(value: Any, inside: Sequence[Any], function: Callable[..., Any]) -> bool:
    if isinstance(value, dict) and len(inside) == 2:
        keys, values = inside
        first = list(value.items())[:_ITEMS]
        return all(_fits(key, keys, function) and _fits(item, values, function) for key, item in first)
    if isinstance(value, _OF_ITEMS) and inside:
        has_own_types = isinstance(value, tuple) and len(inside) == len(value) and inside[-1] is not Ellipsis
        if has_own_types:
            return all(_fits(item, kind, function) for item, kind in zip(value, inside, strict=True))
        return all(_fits(item, inside[0], function) for item in list(value)[:_ITEMS])
    return True


def _find_unwritable(value: object) -> str | None:
    """Why no file, and no terminal, takes an argument or the first such item of it; None: it can be written."""
    items = list(value)[:_ITEMS] if isinstance(value, list | tuple | dict) else [value]
    for item in items:
        reason = _explain_unwritable(item)
        if reason is not None:
            return reason
    return None


def _explain_unwritable(value: object) -> str | None:
    """Why no file, and no terminal, takes a text or a path; None: it can be written, or is neither."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(text, str) and "\0" in text:
        return "holds a NUL character"
    try:
        if isinstance(text, str):
            os.fsencode(text)
    except UnicodeError:
        return "holds half of a surrogate pair"
    return None
