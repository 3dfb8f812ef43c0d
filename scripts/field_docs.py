"""What dataclasses say of themselves and of their fields: for the pages that are made of it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise

__all__ = ["describe", "meanings"]


def describe(kind: type) -> str:
    """What a class says of itself, its paragraphs on one line each."""
    paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    return "\n\n".join(_paragraph(text) for text in paragraphs)


def _paragraph(text: str) -> str:
    if re.search(r"\S {3,}\S", text):  # a drawn table
        return f"```text\n{text}\n```"
    return " ".join(text.split())


def meanings(kind: type) -> Iterator[tuple[str, str]]:
    """What the text below each field says, by the field's name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef)
    for node, below in pairwise(definition.body):
        is_field = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield node.target.id, " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
