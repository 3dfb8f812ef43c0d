"""Promises about the source itself: who imports whom, what importing costs, which names are public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import onnx_lora
from scripts.house import imports_between, longest_chain, source_files

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
    "onnxruntime_errors": {"errors"},
    "json_text": {"errors"},
    "json_file": {"errors", "boundary", "json_text"},
    "whatis": {"errors", "json_text"},
    "expressions": set(),
    "quantized": set(),
    "kinds": set(),
    "roles": set(),
    "codec": set(),
    "heads": set(),
    "strength": {"arguments"},
    "older_manifests": {"kinds", "roles"},
    "points": {"kinds", "roles", "quantized"},
    "manifest": {"errors", "codec", "older_manifests", "kinds", "roles", "points"},
    "manifest_checks": {"kinds", "points", "manifest"},
    "folded": {"manifest", "package", "adapters", "strength"},
    "package": {
        "whatis",
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
        "codec",
        "whatis",
        "lazy",
        "errors",
        "arguments",
        "onnxruntime_errors",
        "boundary",
        "json_file",
        "json_text",
        "staging",
        "kinds",
        "points",
        "roles",
        "manifest",
        "package",
        "expressions",
        "heads",
        "strength",
    },
    "exporter": {
        "extras",
        "folded",
        "whatis",
        "lazy",
        "errors",
        "onnxruntime_errors",
        "boundary",
        "json_file",
        "json_text",
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
        "strength",
    },
    "runtime": {
        "folded",
        "lazy",
        "errors",
        "arguments",
        "onnxruntime_errors",
        "boundary",
        "json_file",
        "json_text",
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
        "strength",
    },
    "heat": {"errors"},
    "results": {"errors", "folded", "package", "adapters", "exporter", "runtime", "demo", "demo_text"},
    "wording": {"results"},
    "report": {
        "heat",
        "errors",
        "results",
        "wording",
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
    "commands": {
        "whatis",
        "heat",
        "results",
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
    "cli": {"errors", "boundary", "commands", "results"},
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


# The order inside a top folder: chains of layers, from what is imported to what imports. A module or folder imports
# nothing of a later layer, and of its own layer only itself: formats stand side by side, and so do passes.
LAYERS: dict[str, list[list[set[str]]]] = {
    "adapters": [
        # The core knows no format; formats may use it.
        [{"align"}, {"binding"}, {"portable"}, {"formats"}, {"read", "batch"}, {"write"}],
        [
            {"adapter"},
            {"factors", "bases", "explain", "module_names"},
            {"fused", "tied", "tensor_layout"},
            {"align", "point_layout", "weight_layout", "rebinding"},
            {"binding"},
        ],
        [{"adapter"}, {"compose"}, {"row_stacking"}],
        [
            {"scale", "problems"},
            {"adapter"},
            {"formats.files"},
            {"methods"},
            {"formats.builder", "formats.place", "module_names"},
            {"formats.format"},
            {"formats.registry"},
            {"formats.peft"},
            {"formats.diffusion", "formats.gguf", "formats.mlx", "formats.converted"},
        ],
        [{"formats.registry"}, {"read", "portable"}, {"write"}],
    ],
    "exporter": [
        [
            {"foreign_libraries"},
            {"graph.axes", "intake.functions", "intake.onnx_file", "ort_check"},
            {"intake.load"},
            {"build"},
        ],
        # Nouns below, then the passes side by side, then who orders them.
        [
            {"graph.values"},
            {"graph.product"},
            {"locating.located"},
            {"sites.site"},
            {"sites.find_sites", "sites.whole_weights", "surgery.untie", "surgery.inject"},
            {"sites.choose", "writing.graph_writer"},
            {"build"},
        ],
        [
            {"graph_kinds.graph_kind"},
            {"locating.located", "weights.checkpoint_weights"},
            {"locating.candidates"},
            {"locating.locate"},
            {"build"},
        ],
        [{"graph.scopes"}, {"locating.traces", "locating.surroundings"}, {"locating.doubts"}, {"build"}],
        [
            {"surgery.surgeon"},
            {"surgery.branches"},
            {"graph_kinds.linear", "graph_kinds.embedding", "graph_kinds.conv"},
        ],
        [
            {"surgery.branches", "graph.placement"},
            {"surgery.inject"},
            {"writing.graph_writer"},
            {"build"},
            {"api", "quantization"},
        ],
        [{"sites.free_outputs", "writing.manifest_entries"}, {"writing.graph_writer"}, {"build"}],
        [{"sites.offer"}, {"sites.choose", "writing.graph_writer"}, {"build"}],
        [
            {"weights.checkpoint_weights"},
            {"weights.torch_weights", "weights.safetensors_weights", "weights.package_weights"},
            {"quantization"},
        ],
        [
            {"weights.torch_weights", "weights.safetensors_weights"},
            {"frontends"},
            {"api", "quantization", "verification.verify"},
        ],
        [{"verification.comparison"}, {"verification.random_adapters"}, {"verification.verify"}],
    ],
    "runtime": [
        [{"_ort"}, {"store"}, {"session"}, {"generation"}, {"measuring"}],
        [{"_ort"}, {"lease"}, {"session"}],
        [{"_onnx", "merge"}, {"requantize"}, {"folding"}, {"measuring"}],
        [{"_onnx", "merge"}, {"requantize"}, {"standalone"}],
    ],
}

# Modules in the longest chain of imports, each loaded with the one before.
DEEPEST = 8


def _edges() -> Mapping[str, set[str]]:
    return imports_between(source_files())


def _chains() -> Iterator[tuple[str, list[set[str]]]]:
    for folder, chains in LAYERS.items():
        for chain in chains:
            yield folder, chain


@pytest.mark.parametrize("folder, chain", list(_chains()))
def test_imports_inside_a_folder_follow_its_layers(folder: str, chain: list[set[str]]) -> None:
    edges = _edges()
    ranks: dict[str, int] = {}
    for rank, layer in enumerate(chain):
        ranks |= {f"onnx_lora.{folder}.{name}": rank for name in layer}
    for layer in ranks:
        assert _within(layer, edges), f"{layer} is gone: correct LAYERS"
        for module in _within(layer, edges):
            for other in edges[module]:
                later = [name for name in ranks if other in _within(name, edges) and name != layer]
                assert all(ranks[name] < ranks[layer] for name in later), f"{module} imports {other}"


def _within(name: str, edges: Mapping[str, set[str]]) -> list[str]:
    """The module of a name, or the modules of a folder of that name."""
    return [module for module in edges if module == name or module.startswith(f"{name}.")]


def test_chains_of_imports_are_short() -> None:
    chain = longest_chain(_edges())
    assert len(chain) <= DEEPEST, "\n".join(chain)


# What CONTRIBUTING promises, and the files that do not keep it yet. A file leaves its set with the change that mends
# it, and none comes in.
NOT_YET: dict[str, set[str]] = {
    "scale": set(),
    "ONNX Runtime's exceptions": set(),
    "foreign names": {
        "adapters/factors.py",
    },
    "any exception": {
        "commands/options.py",
    },
}

# Spellings of other people's files, which only formats and methods know.
FOREIGN = (
    "base_model.model",
    "base_layer",
    "original_module",
    "lora_magnitude_vector",
    "lora_unet_",
    "lora_te",
    "lora_down",
    "lora_up",
    "hada_w",
    "lokr_w",
    "blk.",
)


def _parsed() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text("utf-8"))


def test_the_scale_is_computed_in_one_function() -> None:
    """Nothing but `lora_scale` divides an alpha."""
    found = set()
    for file, tree in _parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and _last_name(node.left).endswith("alpha"):
                found.add(file)
    assert found <= NOT_YET["scale"] | {"adapters/scale.py"}


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def test_the_exceptions_of_onnx_runtime_are_known_in_one_file() -> None:
    found = {file for file, tree in _parsed() if any(name.startswith("onnxruntime.capi") for name in _named(tree))}
    assert len(found - NOT_YET["ONNX Runtime's exceptions"]) <= 1, sorted(found)


def _named(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_foreign_names_stand_in_formats_and_methods_alone() -> None:
    found = set()
    for file, tree in _parsed():
        for text in _texts(tree):
            if any(spelling in text for spelling in FOREIGN) and not file.startswith(
                ("adapters/formats/", "adapters/methods/")
            ):
                found.add(file)
    # Which asks PEFT itself for its tensors, in PyTorch.
    assert found <= NOT_YET["foreign names"] | {"exporter/verification/random_adapters.py"}


def _texts(tree: ast.Module) -> Iterator[str]:
    """Every text of a file but its docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


# Where any exception is caught, and why. All of them translate, and nothing else does.
BOUNDARIES = {
    "boundary.py": "the one around every public function, and around other people's formats",
    "exporter/foreign_libraries.py": "around libraries that read foreign graphs, which name the step and the file",
    "onnxruntime_errors.py": "around ONNX Runtime, whose exceptions have no names of their own",
    "runtime/generation/text.py": "around tokenizers, whose Rust code panics",
    "cli.py": "the command's main, which has none above it",
    "exporter/elsewhere.py": "the process in another Python, with nothing above it",
    "runtime/generation/template_child.py": "the child process, with a foreign program below it",
}


def test_any_exception_is_caught_at_the_boundaries_alone() -> None:
    found = set()
    for file, tree in _parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and _catches_everything(node) and not _lets_it_pass(node):
                found.add(file)
    assert found <= NOT_YET["any exception"] | set(BOUNDARIES)


def _lets_it_pass(handler: ast.ExceptHandler) -> bool:
    """A handler that tidies up, and raises what it caught."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or _last_name(kind) in ("Exception", "BaseException") for kind in kinds)


def test_the_architecture_page_shows_every_module(request: pytest.FixtureRequest) -> None:
    """`make docs` rewrites the tree: a folder or module a line, with the first sentence of its docstring."""
    page = ROOT.parent / "docs" / "architecture.md"
    text = page.read_text("utf-8")
    before, _, rest = text.partition("<!-- tree -->\n")
    shown, _, after = rest.partition("<!-- /tree -->")
    expected = f"\n```text\n{chr(10).join(_tree())}\n```\n\n"
    if request.config.getoption("--write-docs"):
        page.write_text(f"{before}<!-- tree -->\n{expected}<!-- /tree -->{after}", "utf-8")
        return
    missing = sorted(set(_tree()) - set(shown.splitlines()))
    gone = sorted(set(shown.splitlines()) - set(expected.splitlines()))
    assert not missing, "\n".join(["docs/architecture.md lacks (run make docs):", *missing])
    assert not gone, "\n".join(["docs/architecture.md has (run make docs):", *gone])
    assert shown == expected, "docs/architecture.md has the lines in another order: run make docs"


def _tree() -> list[str]:
    lines = ["onnx_lora/"]
    _add_folder(ROOT, 1, lines)
    return lines


def _add_folder(folder: Path, depth: int, lines: list[str]) -> None:
    """Files of a folder, and then the folders in it, with what is in those."""
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            lines.append(_line(depth, file.name, file))
    for inner in sorted(folder.iterdir()):
        if (inner / "__init__.py").is_file():
            lines.append(_line(depth, f"{inner.name}/", inner / "__init__.py"))
            _add_folder(inner, depth + 1, lines)


def _line(depth: int, name: str, file: Path) -> str:
    words = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split()
    sentence = " ".join(words).partition(". ")[0].removesuffix(".")
    return f"{'  ' * depth}{name:24} {sentence}".rstrip()


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
