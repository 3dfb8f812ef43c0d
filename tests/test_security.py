"""The numbers that SECURITY.md promises are those that the code keeps."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import onnx_lora

SOURCE = Path(onnx_lora.__file__).parent
TEXT = (SOURCE.parent / "SECURITY.md").read_text("utf-8")

# | what | 64 MiB | `package.py` `_MANIFEST_LIMIT` |
ROWS = re.findall(r"^\| ([^|]+) \| ([\d,]+)( MiB| s)? \| `([^`]+)` `(\w+)` \|$", TEXT, re.MULTILINE)


def _value(node: ast.expr) -> float:
    """A number, or an arithmetic of numbers."""
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        return float(left**right if isinstance(node.op, ast.Pow) else left * right)
    assert isinstance(node, ast.Constant)
    return float(node.value)  # type: ignore[arg-type]


def test_there_are_limits() -> None:
    table = TEXT.split("## Limits")[1].split("\n## ")[0]
    assert len(ROWS) == table.count("\n| ") - 1  # the heading


@pytest.mark.parametrize("what, number, unit, file, name", ROWS, ids=[row[4] for row in ROWS])
def test_a_limit_is_the_one_that_is_written(what: str, number: str, unit: str, file: str, name: str) -> None:
    tree = ast.parse((SOURCE / file).read_text("utf-8"))
    found = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name
    ]
    assert len(found) == 1, f"{file} has no {name} any more: what limits {what}?"
    assert _value(found[0]) == int(number.replace(",", "")) * (2**20 if unit == " MiB" else 1), what
