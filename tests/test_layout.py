"""Promises about the source itself: who imports whom, what importing costs, which names are public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnx_lora

ROOT = Path(onnx_lora.__file__).parent

# DESIGN: cli -> exporter, adapters, runtime; exporter and runtime meet only in a package on disk.
ALLOWED = {
    "errors": set[str](),
    "extras": set(),
    "lazy": {"errors", "extras"},
    "arguments": set(),
    "boundary": {"errors", "extras", "arguments"},
    "staging": {"errors", "boundary"},
    "companions": {"errors"},
    "json_file": {"errors", "boundary"},
    "expressions": set(),
    "quantized": set(),
    "kinds": set(),
    "roles": set(),
    "codec": set(),
    "heads": set(),
    "older_manifests": {"kinds", "roles"},
    "points": {"kinds", "roles", "quantized"},
    "manifest": {"errors", "codec", "older_manifests", "kinds", "roles", "points"},
    "manifest_checks": {"kinds", "points", "manifest"},
    "package": {
        "manifest_checks",
        "errors",
        "boundary",
        "companions",
        "json_file",
        "kinds",
        "points",
        "manifest",
        "quantized",
        "staging",
    },
    "adapters": {
        "lazy",
        "errors",
        "boundary",
        "json_file",
        "staging",
        "kinds",
        "points",
        "roles",
        "manifest",
        "package",
        "expressions",
        "heads",
    },
    "exporter": {
        "lazy",
        "errors",
        "boundary",
        "json_file",
        "staging",
        "companions",
        "kinds",
        "points",
        "roles",
        "manifest",
        "package",
        "quantized",
        "expressions",
        "heads",
    },
    "runtime": {
        "lazy",
        "errors",
        "boundary",
        "json_file",
        "staging",
        "companions",
        "kinds",
        "points",
        "roles",
        "manifest",
        "package",
        "adapters",
        "quantized",
        "heads",
    },
    "heat": {"errors"},
    "report": {
        "heat",
        "errors",
        "points",
        "manifest",
        "package",
        "adapters",
        "demo",
        "demo_text",
        "exporter",
        "runtime",
    },
    "demo_text": {"errors", "staging", "points", "manifest", "package", "adapters", "exporter", "runtime"},
    "demo": {"errors", "staging", "points", "manifest", "package", "adapters", "exporter", "runtime"},
    "cli": {
        "heat",
        "errors",
        "boundary",
        "staging",
        "points",
        "roles",
        "manifest",
        "package",
        "adapters",
        "exporter",
        "runtime",
        "demo",
        "demo_text",
        "report",
    },
    "__main__": {"cli", "extras"},
}


def _modules() -> Iterator[tuple[str, Path]]:
    for file in sorted(ROOT.rglob("*.py")):
        part = file.relative_to(ROOT).with_suffix("").parts[0]
        if part != "__init__":
            yield part, file


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "onnx_lora")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    "part, file", list(_modules()), ids=lambda value: value.stem if isinstance(value, Path) else value
)
def test_imports_follow_the_arrows(part: str, file: Path) -> None:
    for name in _imports(file):
        pieces = name.split(".")
        if pieces[0] == "onnx_lora" and len(pieces) > 1 and pieces[1] != "__version__":
            assert pieces[1] in ALLOWED[part] | {part}, f"{file.relative_to(ROOT)} imports {name}"


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import onnx_lora", {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime"}),
        ("import onnx_lora.runtime", {"torch", "transformers", "onnx", "onnx_ir"}),
        ("import onnx_lora.adapters", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("from onnx_lora.exporter import attach", {"torch", "transformers", "optimum", "peft", "onnxruntime"}),
        ("import onnx_lora.cli", {"torch", "transformers", "onnx", "onnxruntime"}),
    ],
)
def test_importing_stays_light(statement: str, absent: set[str]) -> None:
    assert not absent & _loaded_by(statement)


@pytest.mark.parametrize(
    "name", ["onnx_lora", "onnx_lora.exporter", "onnx_lora.adapters", "onnx_lora.runtime", "onnx_lora.errors"]
)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    module = __import__(name, fromlist=["__all__"])
    assert module.__doc__
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for public in module.__all__:
        assert public == "__version__" or getattr(module, public).__doc__, f"{name}.{public} has no docstring"


def test_the_public_names_are_the_designed_ones() -> None:
    assert {"AdapterSession", "fold", "fold_to", "read_adapter", "bind", "Package"} <= set(onnx_lora.__all__)


def test_modules_open_with_a_sentence() -> None:
    for _, file in _modules():
        assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), f"{file} says nothing about itself"


def test_errors_are_drawn_as_they_are() -> None:
    from onnx_lora import errors

    drawing = errors.__doc__ or ""
    for name in errors.__all__:
        assert name in drawing, f"{name} is missing from the tree at the top of errors.py"


def test_the_version_is_the_same_everywhere() -> None:
    import tomllib

    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == onnx_lora.__version__
    assert f"## {onnx_lora.__version__}" in (ROOT.parent / "CHANGELOG.md").read_text("utf-8")
