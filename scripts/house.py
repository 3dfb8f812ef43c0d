"""A thermometer of the source: how deep import chains go, how tightly lines are packed, where kinds are compared.

`python scripts/house.py [folder ...]` prints one line a folder and one for all; `--json` gives data. `test_layout`
holds the depth of the chains. Nothing enforces the other numbers: they are for whoever reads before and after a change.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "onnx_lora"

# The names under which a kind of module stands in files; only what reads and writes those should know them.
KINDS = ("linear", "embedding", "conv")

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", help="parts of onnx_lora, such as adapters/formats; default: all of it")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    files = source_files()
    chain = longest_chain(imports_between(files))
    report = {
        "chain": list(chain),
        "depth": len(chain),
        "parts": {folder: measure(files, folder) for folder in [*given.folders, ""]},
    }
    if given.json:
        json.dump(report, sys.stdout, indent=1)
        print()
        return
    print(f"longest chain of imports: {len(chain)} modules\n  " + "\n  ".join(chain))
    for folder, numbers in report["parts"].items():
        print(f"{folder or 'everything'}: " + ", ".join(f"{value} {name}" for name, value in numbers.items()))


def source_files() -> Mapping[str, Path]:
    """The package's files, by the name of their module."""
    found: dict[str, Path] = {}
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_between(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which module imports which when it is loaded: no imports within functions, and none for type checkers alone."""
    edges: dict[str, set[str]] = {}
    for name, file in files.items():
        edges[name] = set()
        for node in _loaded_at_once(ast.parse(file.read_text("utf-8"))):
            for target in _targets(node):
                known = _known(target, files)
                if known and known != name:
                    edges[name].add(known)
    return edges


def longest_chain(edges: Mapping[str, set[str]]) -> tuple[str, ...]:
    """The longest path, from the module that imports to the one that imports nothing. Raises ValueError: a cycle."""
    longest: dict[str, tuple[str, ...]] = {}
    visiting: set[str] = set()

    def of(module: str) -> tuple[str, ...]:
        if module in longest:
            return longest[module]
        if module in visiting:
            raise ValueError(f"{module} imports itself through others")
        visiting.add(module)
        below = [of(other) for other in sorted(edges[module])]
        visiting.remove(module)
        longest[module] = (module, *max(below, key=len, default=()))
        return longest[module]

    return max((of(module) for module in edges), key=len)


def measure(files: Mapping[str, Path], folder: str) -> dict[str, float]:
    """The numbers of the files below a folder."""
    lines = nodes = comprehensions = nested = comparing = functions = documented = 0
    for file in files.values():
        place = file.relative_to(ROOT / PACKAGE).as_posix()
        if not place.startswith(folder):
            continue
        text = file.read_text("utf-8")
        tree = ast.parse(text)
        lines += _lines_of_code(text, tree)
        compares = False
        for node in ast.walk(tree):
            nodes += 1
            if isinstance(node, _COMPREHENSIONS):
                comprehensions += 1
                nested += len(node.generators) > 1
            if isinstance(node, ast.Compare):
                compares |= any(_is_kind(part) for part in ast.walk(node))
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                functions += 1
                documented += ast.get_docstring(node) is not None
        comparing += compares
    return {
        "lines of code": lines,
        "syntax nodes a line": round(nodes / max(1, lines), 1),
        "comprehensions in 100 lines": round(100 * comprehensions / max(1, lines), 1),
        "comprehensions with two loops": nested,
        "files that compare a kind's literal": comparing,
        "public functions without a docstring": functions - documented,
    }


def _loaded_at_once(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield from _loaded_at_once(other)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _loaded_at_once(node)


def _targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif node.module and not node.level:
        for alias in node.names:
            yield f"{node.module}.{alias.name}"


def _known(target: str, files: Mapping[str, Path]) -> str | None:
    """The module that `a.b.name` is or lies in."""
    if target in files:
        return target
    parent = target.rpartition(".")[0]
    return parent if parent in files else None


def _lines_of_code(text: str, tree: ast.AST) -> int:
    """Lines that are neither empty nor a comment nor part of a docstring."""
    said: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            said.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    count = 0
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.strip()
        count += bool(bare) and not bare.startswith("#") and number not in said
    return count


def _is_kind(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in KINDS


if __name__ == "__main__":
    main()
