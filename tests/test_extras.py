"""What is imported is declared: every library in `pyproject.toml`, in the extra that brings it, and nothing more."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import onnx_lora
from onnx_lora.extras import EXTRAS, how_to_install, how_to_install_for

ROOT = Path(onnx_lora.__file__).parent.parent
PACKAGE = ROOT / "onnx_lora"

# What the parts of the package may import, beside the base's numpy and safetensors: the extras that bring it. A part
# that is not listed imports nothing else.
PARTS = {
    "adapters": {"cpu", "gguf"},
    "runtime": {"cpu", "fold", "generate"},
    "exporter": {"cpu", "attach", "export", "genai", "optimum", "diffusion"},
    "cli": {"cli"},
    "commands": {"cli"},
    "onnxruntime_errors": {"cpu"},
    "report": {"cli"},
    "heat": {"plot"},
    "demo": {"demo"},
    "demo_text": {"demo"},
}

# Of these, what a part may need as soon as it is imported.
AT_ONCE = {"exporter": {"attach"}, "cli": {"cli"}, "commands": {"cli"}, "report": {"cli"}, "heat": {"cli"}}

# Import names that are not their distribution's name.
DISTRIBUTIONS = {"google": "protobuf", "optimum": "optimum-onnx"}

# Declared, and imported by others for us.
IMPORTED_BY_OTHERS = {
    "sympy": "onnxruntime.tools.symbolic_shape_infer imports it and does not declare it",
    "onnxruntime-gpu": "another build of onnxruntime",
    "onnxruntime-genai": "runs as a process: python -m onnxruntime_genai.models.builder",
}


def _project() -> dict[str, list[str]]:
    """Requirements by extra; those of the base under ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def _brought_by(extra: str) -> set[str]:
    """The distributions that an extra installs by name, those of extras that it names included."""
    found: set[str] = set()
    for requirement in _project()[extra]:
        name, others = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?.*", requirement).groups()  # type: ignore[union-attr]
        if name == "onnx-lora":
            for other in others.split(","):
                found |= _brought_by(other)
        else:
            found.add(name)
    return found


def _distribution(module: str) -> str:
    name = module.partition(".")[0]
    return DISTRIBUTIONS.get(name, name.replace("_", "-"))


def _foreign(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The modules of others that the nodes import, without Python's own and this project's."""
    ours = {*sys.stdlib_module_names, "onnx_lora", "tests", "benchmarks", "scripts", "examples", "_texts"}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] not in ours:
                yield name


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _part(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_what_a_file_imports_is_declared(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    extras = PARTS.get(_part(file), set())
    allowed = _brought_by("").union(*map(_brought_by, extras))
    for module in _foreign(ast.walk(tree)):
        assert _distribution(module) in allowed, f"{module} is not in {sorted(extras) or 'the base'}"
    at_once = _brought_by("").union(*map(_brought_by, AT_ONCE.get(_part(file), set())))
    for module in _foreign(tree.body):
        assert _distribution(module) in at_once, f"{module} is imported when the file is, and must be imported late"


def test_what_is_declared_is_imported() -> None:
    imported: set[str] = set()
    for file in _files():
        imported |= {_distribution(module) for module in _foreign(ast.walk(ast.parse(file.read_text("utf-8"))))}
    declared: set[str] = set()
    for extra in _project():
        if extra not in ("dev", "docs"):
            declared |= _brought_by(extra)
    assert declared - imported == set(IMPORTED_BY_OTHERS)


def test_what_the_tests_import_is_declared() -> None:
    declared = set().union(*map(_brought_by, _project()))
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for module in _foreign(ast.walk(ast.parse(file.read_text("utf-8")))):
            assert _distribution(module) in declared, f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("module, extra", sorted(EXTRAS.items()))
def test_the_extra_that_an_error_names_brings_the_library(module: str, extra: str) -> None:
    assert _distribution(module) in _brought_by(extra)
    assert how_to_install(f"{module}.part") == f"pip install 'onnx-lora[{extra}]'"


@pytest.mark.parametrize("name", ["attach", "export", "quantize", "verify", "Pipeline"])
def test_what_a_public_name_needs_is_installed_at_once(name: str) -> None:
    """Not the smallest extra of the first library that is missing, and then the next one's."""
    cure = how_to_install_for(name, "onnx_ir") or ""
    extras = cure.partition("[")[2].partition("]")[0].split(",")
    assert set(extras) <= {"attach", "diffusion", "export"}
    brought = set().union(*map(_brought_by, extras))
    assert {"onnx", "onnx-ir", "sympy"} <= brought
    assert ("torch" in brought) == (name not in ("attach", "quantize"))
    assert how_to_install_for(name, "nobody_knows") is None


def test_an_unknown_library_has_no_extra() -> None:
    assert how_to_install("nobody_knows") is None


def test_every_extra_that_a_message_names_exists() -> None:
    """Messages are written by hand, in many files."""
    for file in [*_files(), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for extras in re.findall(r"onnx-lora\[([\w,]+)\]", file.read_text("utf-8")):
            assert set(extras.split(",")) <= set(_project()), f"{file.name}: onnx-lora[{extras}]"


def test_a_device_gets_no_command_and_nothing_that_changes_graphs() -> None:
    device = set().union(*map(_brought_by, ["", "cpu", "generate", "gguf"]))
    assert device == {"numpy", "safetensors", "onnxruntime", "tokenizers", "jinja2", "gguf"}
