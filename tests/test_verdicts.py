"""Every file of another format, and every config, that people published: what is made of it, in a table of the docs.

With --write-docs the table is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from onnx_lora import OnnxLoraError, read_adapter
from onnx_lora.adapters import Delta
from onnx_lora.adapters.formats.peft.config import read_config

DOCS = Path(__file__).parent.parent / "docs" / "verdicts.md"

INTRO = """# What is made of files that people published

[real-adapters.md](real-adapters.md) runs every published PEFT adapter on a base of its architecture. Here are the
files of other formats and the configs alone: what is read of each, or why it is refused. "Read" means that every
tensor, or every field, has its place; what a package then makes of it, `bind` says. `make docs` writes this page.
"""

FORMATS = """
## Other formats

| file | format | what it holds | verdict |
|---|---|---|---|
"""

CONFIGS = """
## Configs of PEFT

| file | method | verdict |
|---|---|---|
"""


def _cell(text: object) -> str:
    return str(text).replace("|", chr(92) + "|").replace("\n", " ")


def _refusal(error: OnnxLoraError, names: Path) -> str:
    """The reason without the path, which is another on every machine."""
    more = f", and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
    text = f"refused: {'; '.join([error.message, *error.problems[:1]])}{more}"
    return text.replace(str(names), names.name)


def _files(root: Path) -> list[Path]:
    """A folder that says what it is goes whole, one of loose files file by file."""
    whole = ("adapter_config.json", "pytorch_lora_weights.safetensors", "adapters.npz")
    paths: list[Path] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if any((folder / name).is_file() for name in whole):
            paths.append(folder)
        else:
            paths += sorted(folder.glob("*.safetensors"))
    return paths


def _of_format(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        adapter = read_adapter(path)
    except OnnxLoraError as error:
        return f"| {name} | | | {_cell(_refusal(error, path))} |"
    kinds: Counter[str] = Counter()
    for delta in adapter.deltas.values():
        kind = delta.kind.name if isinstance(delta, Delta) else "pair of matrices"
        kinds[f"{kind}, r = {delta.rank}, scale {delta.scale:g}"] += 1
    holds = [f"{count} × {kind}" for kind, count in sorted(kinds.items())]
    holds += [f"{len(adapter.changes)} changes"] * bool(adapter.changes)
    holds += [f"{len(adapter.replacements)} whole weights"] * bool(adapter.replacements)
    return f"| {name} | {adapter.origin.format} | {_cell('; '.join(holds))} | read |"


def _of_config(path: Path) -> str:
    try:
        method = read_config(path).method_name
    except OnnxLoraError as error:
        return f"| {path.name} | | {_cell(_refusal(error, path))} |"
    return f"| {path.name} | {_cell(method)} | read |"


def test_every_published_file_has_the_verdict_of_the_docs(data: Path, request: pytest.FixtureRequest) -> None:
    root = data / "other_formats"
    formats = [_of_format(path, root) for path in _files(root)]
    configs = [_of_config(path) for path in sorted((data / "adapter_configs").glob("*.json"))]
    assert len(formats) >= len([path for path in root.iterdir() if path.is_dir()])
    text = INTRO + FORMATS + "\n".join(formats) + "\n" + CONFIGS + "\n".join(configs) + "\n"
    if request.config.getoption("--write-docs"):
        DOCS.write_text(text, "utf-8")
    assert DOCS.read_text("utf-8") == text, "the table is another now: write it with `make docs`, and look at it"
