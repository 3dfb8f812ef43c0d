"""The public contract: which names there are, where they come from, and that type checkers see their types."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import onnx_lora
from onnx_lora import errors

ROOT = Path(onnx_lora.__file__).parent.parent
USER = Path(__file__).parent / "typing" / "user.py"

# A name that is added here is promised: docs/stability.md says for how long.
PUBLIC = {
    "Adapter",
    "AdapterSession",
    "BoundAdapter",
    "Cache",
    "Chat",
    "Converted",
    "ConvertedFolder",
    "Checkpoint",
    "Generation",
    "OnnxFiles",
    "Package",
    "Piece",
    "Pipeline",
    "Points",
    "Precision",
    "Requantize",
    "Sampling",
    "Stream",
    "TextGenerator",
    "TorchModule",
    "__version__",
    "attach",
    "bind",
    "convert_all",
    "export",
    "fold",
    "fold_to",
    "measure",
    "quantize",
    "read_adapter",
    "verify",
    "write_adapter",
    "write_bound",
}

ERRORS = {
    "AdapterError",
    "AdapterFileError",
    "BindError",
    "CacheError",
    "ExportError",
    "FeedError",
    "InputError",
    "InternalError",
    "MissingDependencyError",
    "ModelError",
    "OnnxLoraError",
    "OutputExistsError",
    "OutsideError",
    "PackageError",
    "PluginError",
    "PromptError",
    "RunError",
    "SamplingError",
    "SelectionError",
    "SeveralAdaptersError",
    "StorageError",
    "UnsupportedAdapterError",
    "VerificationError",
}

FACADES = ["onnx_lora", "onnx_lora.adapters", "onnx_lora.exporter", "onnx_lora.runtime"]


def test_the_public_names_are_these() -> None:
    assert set(onnx_lora.__all__) == PUBLIC | ERRORS


def test_every_error_is_public() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    own = {name for name in defined if issubclass(vars(errors)[name], errors.OnnxLoraError)}
    assert own == ERRORS


def test_dir_shows_the_public_names() -> None:
    command = "import onnx_lora; print(*dir(onnx_lora))"
    shown = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert set(shown.split()) >= PUBLIC | ERRORS


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'onnx_lora' has no attribute 'merge'"):
        onnx_lora.merge  # noqa: B018


@pytest.mark.parametrize("name", FACADES)
def test_a_facade_says_its_names_three_times_and_the_same(name: str) -> None:
    """For readers and `import *` (`__all__`), for type checkers, and for the loader."""
    module = importlib.import_module(name)
    listed = set(module.__all__) - {"__version__"}
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    assert _homes_for_checkers(tree) == _homes_for_the_loader(tree)
    assert set(_homes_for_checkers(tree)) == listed


def _homes_for_checkers(tree: ast.Module) -> dict[str, str]:
    homes: dict[str, str] = {}
    for block in tree.body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name):
            for statement in block.body:
                assert isinstance(statement, ast.ImportFrom)
                for alias in statement.names:
                    homes[alias.name] = str(statement.module)
    return homes


def _homes_for_the_loader(tree: ast.Module) -> dict[str, str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazy_names":
            return dict(ast.literal_eval(node.args[1]))
    raise AssertionError("no call of lazy_names")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx_lora.lazy import lazy_names

    def fail(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")

    load, _ = lazy_names("onnx_lora.example", {"attach": "onnx_lora.exporter.api"})
    monkeypatch.setattr("onnx_lora.lazy.import_module", fail)
    with pytest.raises(errors.MissingDependencyError, match=r"needs onnx_ir; install it: pip install 'onnx-lora\["):
        load("attach")


def test_a_module_of_ours_that_is_missing_is_no_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx_lora.lazy import lazy_names

    load, _ = lazy_names("onnx_lora.example", {"attach": "onnx_lora.nowhere"})
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        load("attach")


def test_the_users_file_uses_every_public_name() -> None:
    tree = ast.parse(USER.read_text("utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used >= PUBLIC | ERRORS


@pytest.mark.slow
def test_a_strict_type_checker_accepts_the_users_file() -> None:
    result = _mypy(USER)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_a_strict_type_checker_refuses_what_is_wrong(tmp_path: Path) -> None:
    """So that the test before is no test of `Any`."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from onnx_lora import Package, bind, merge, read_adapter\n"
        "bound: int = bind(read_adapter('a'), Package.open('b'))\n"
        "read_adapter(1)\n"
    )
    result = _mypy(wrong)
    assert 'has no attribute "merge"' in result.stdout, result.stdout + result.stderr
    assert "BoundAdapter" in result.stdout
    assert "arg-type" in result.stdout


def _mypy(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--ignore-missing-imports"]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "user"), str(file)]
    # onnx_lora as a path to search is silent about its own lines, as an installed package is.
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, text=True, check=False)
