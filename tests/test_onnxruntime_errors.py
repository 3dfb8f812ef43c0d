"""ONNX Runtime's exceptions become ours in one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnx_lora
from onnx_lora.errors import ExportError, FeedError, InputError, MissingDependencyError, PackageError, RunError
from onnx_lora.onnxruntime_errors import (
    fail_as,
    fail_in_run,
    fail_to_start,
    load_onnxruntime,
    native_failures,
)

ROOT = Path(onnx_lora.__file__).parent
PLACE = ROOT / "onnxruntime_errors.py"
OTHERS = [file for file in sorted(ROOT.rglob("*.py")) if file != PLACE]

# Calls of ONNX Runtime's, by the last part of their names.
CALLS = {
    "AdapterFormat",
    "IOBinding",
    "InferenceSession",
    "bind_ortvalue_input",
    "export_adapter",
    "ortvalue_from_numpy",
    "ortvalue_from_numpy_with_onnx_type",
    "quantize_dynamic",
    "read_adapter",
    "run_with_iobinding",
    "run_with_ort_values",
}

# What ONNX Runtime raises, beside its own classes.
CAUGHT = {"Exception", "BaseException", "RuntimeError", "MemoryError"}


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_catches_what_onnxruntime_raises(file: Path) -> None:
    text = file.read_text("utf-8")
    assert "onnxruntime.capi" not in text, "its classes are looked up in onnxruntime_errors.py"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Try) and _names_of_calls(node) & CALLS:
            caught = set(_caught(node))
            assert not caught & CAUGHT, f"line {node.lineno} catches {caught}: use onnxruntime_errors.fail_as"


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_file_says_that_onnxruntime_is_missing(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Try) and {"ImportError", "ModuleNotFoundError"} & set(_caught(node)):
            for part in node.body:
                modules = [alias.name for alias in part.names] if isinstance(part, ast.Import) else []
                modules += [part.module or ""] if isinstance(part, ast.ImportFrom) else []
                assert not any(name.partition(".")[0] == "onnxruntime" for name in modules), part.lineno


def _names_of_calls(node: ast.Try) -> set[str]:
    found: set[str] = set()
    for statement in node.body:
        for inner in ast.walk(statement):
            if isinstance(inner, ast.Call):
                function = inner.func
                if isinstance(function, ast.Attribute):
                    found.add(function.attr)
                elif isinstance(function, ast.Name):
                    found.add(function.id)
    return found


def _caught(node: ast.Try) -> Iterator[str]:
    for handler in node.handlers:
        for inner in ast.walk(handler.type) if handler.type is not None else ():
            if isinstance(inner, ast.Name):
                yield inner.id


@pytest.mark.parametrize(
    "failure", [*native_failures(), RuntimeError, ValueError, TypeError, MemoryError, IndexError, OverflowError]
)
def test_whatever_it_raises_is_translated(failure: type[Exception]) -> None:
    with (
        pytest.raises(ExportError, match="it says: something is wrong") as caught,
        fail_as(lambda said: ExportError(f"it says: {said}")),
    ):
        raise failure("something is wrong\nand more")
    assert isinstance(caught.value.__cause__, failure)
    with pytest.raises((FeedError, RunError)), fail_in_run():
        raise failure("something is wrong")
    if failure not in (MemoryError, IndexError, OverflowError):
        with pytest.raises((PackageError, InputError, RunError)), fail_to_start(None):
            raise failure("something is wrong")


def test_errors_of_ours_pass() -> None:
    for around in (fail_as(ExportError), fail_in_run(), fail_to_start(None)):
        with pytest.raises(PackageError, match="ours"), around:
            raise PackageError("ours")


def test_a_part_that_lacks_a_library_names_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sympy", None)
    monkeypatch.delitem(__import__("sys").modules, "onnxruntime.tools.symbolic_shape_infer", raising=False)
    with pytest.raises(MissingDependencyError, match=r"this needs .*sympy.*install it: pip install 'onnx-lora\[attach"):
        load_onnxruntime("this needs", part="tools.symbolic_shape_infer", extra="attach,cpu")
