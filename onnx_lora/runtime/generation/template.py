"""Chat templates as Hugging Face writes them, rendered by jinja2 in a sandbox. A template is a program that came with
a model: what it may do is limited here. This module needs jinja2; `chat.py` loads it late."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

__all__ = ["TemplateFailure", "render"]

# Templates take a millisecond; one that counts to a billion must not hold its caller.
_SECONDS = 5.0

# No conversation is longer, and one that fits a context is much shorter.
_CHARACTERS = 16 * 2**20

# Numbers beyond this are no lengths.
_LARGE = 2**31

# A width of five digits in a format, or one taken from the values.
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")


class TemplateFailure(Exception):  # noqa: N818 - it never leaves the two modules
    """Why a template gave no text."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks, in training, what the model says; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Python's operators can make a small text as large as the memory in one step: they are looked at before."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not _small(left, right):
            raise TemplateFailure("it computes a power that is too large")
        if operator == "*" and any(hasattr(each, "__len__") for each in (left, right)):
            size, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if isinstance(times, int) and len(size) * times > _CHARACTERS:
                raise TemplateFailure("it repeats a text or list too often")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise TemplateFailure("it formats a value to a great width")
        return super().call_binop(context, operator, left, right)


def _small(base: Any, exponent: Any) -> bool:
    return bool(abs(base) < _LARGE and abs(exponent) < 64)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The template's text. Raises TemplateFailure: it fails, refuses, or takes too long."""
    try:
        with _deadline(_SECONDS):
            template = _environment().from_string(source)
            parts, size = [], 0
            for part in template.generate(**variables):
                parts.append(part)
                size += len(part)
                if size > _CHARACTERS:
                    raise TemplateFailure(f"it writes more than {_CHARACTERS} characters")
        return "".join(parts)
    except jinja2.TemplateError as error:
        raise TemplateFailure(str(error) or type(error).__name__) from error
    # What a template does to values that it did not expect; Jinja passes Python's own exceptions on.
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise TemplateFailure(f"{type(error).__name__}: {error}") from error


def _environment() -> jinja2.Environment:
    """As transformers sets it up (utils/chat_template_utils.py), so that templates mean the same."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # A generator of random prose of any length.
    environment.globals.pop("lipsum", None)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Ends Python code that runs for too long. Loops of a template are such code, line by line."""
    end = time.monotonic() + seconds
    before = sys.gettrace()

    def trace(_frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any]:
        if time.monotonic() > end:
            raise TemplateFailure(f"it runs for more than {seconds:g} seconds")
        return trace

    # A debugger or a coverage tool would lose its place.
    if before is None:
        sys.settrace(trace)
    try:
        yield
    finally:
        if before is None:
            sys.settrace(None)
