"""Writes docs/results.schema.json and the tables of docs/json.md, made of the classes of results and what these say of
their fields.

`python scripts/result_schema.py` prints the schema as it must be; `--write` puts both in their places. A test compares.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "docs" / "results.schema.json"
PAGE = ROOT / "docs" / "json.md"

sys.path.insert(0, str(ROOT))

from onnx_lora import results  # noqa: E402
from onnx_lora.demo import DemoResult  # noqa: E402
from onnx_lora.demo_text import WriterResult  # noqa: E402
from onnx_lora.runtime import Measurement  # noqa: E402
from scripts.field_docs import describe, meanings  # noqa: E402

_BEGIN = "<!-- what follows is made by scripts/result_schema.py -->"

# What a command prints; the last is what any of them prints where it fails.
COMMANDS: Mapping[str, Sequence[type]] = {
    "attach": [results.PackageResult],
    "convert": [results.ConvertResult, results.BatchResult],
    "demo": [results.DemoRun],
    "export": [results.PackageResult],
    "fold": [results.FoldResult],
    "generate": [results.GenerateResult],
    "inspect": [results.PackageResult, results.InspectedAdapter, results.FoldedResult],
    "measure": [Measurement],
    "quantize": [results.PackageResult],
    "run": [results.RunResult],
    "verify": [results.VerifyResult],
    "error": [results.ErrorResult],
}

_SIMPLE: Mapping[Any, Mapping[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    types.NoneType: {"type": "null"},
}

# Names of classes that `onnx_lora.results` knows to type checkers alone.
_ELSEWHERE = {"DemoResult": DemoResult, "WriterResult": WriterResult}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    schema = json.dumps(make_schema(), indent=1, ensure_ascii=False) + "\n"
    if parser.parse_args().write:
        SCHEMA.write_text(schema, "utf-8")
        PAGE.write_text(render(PAGE.read_text("utf-8")), "utf-8")
    else:
        sys.stdout.write(schema)


def make_schema() -> dict[str, Any]:
    """A JSON Schema whose `$defs` has every command and every class."""
    definitions: dict[str, Any] = {}
    for command, classes in COMMANDS.items():
        choices = [_schema_of(kind) for kind in classes]
        definitions[command] = choices[0] if len(choices) == 1 else {"anyOf": choices}
    for kind in _all_classes():
        definitions[kind.__name__] = _schema_of_class(kind)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What the commands of onnx-lora print with --json",
        "description": "Each command's result is under $defs by the command's name, a failure under error.",
        "$defs": definitions,
    }


def render(page: str) -> str:
    """The page with its tables made anew; what is written by hand stays."""
    before, _, _ = page.partition(_BEGIN)
    parts = ["| command | prints |", "|---|---|"]
    for command, classes in COMMANDS.items():
        what = " or ".join(f"[{kind.__name__}](#{kind.__name__.lower()})" for kind in classes)
        parts.append(f"| `{command}` | {what} |" if command != "error" else f"| any, where it fails | {what} |")
    for kind in _all_classes():
        parts += ["", f"### {kind.__name__}", "", describe(kind), "", "| field | type | |", "|---|---|---|"]
        said = dict(meanings(kind))
        for name, hint in _hints(kind).items():
            parts.append(f"| `{name}` | {_words(hint)} | {_in_json(said[name])} |")
    return f"{before}{_BEGIN}\n\n" + "\n".join(parts) + "\n"


def _all_classes() -> list[type]:
    """The classes of all results, each after those that hold it."""
    found: dict[type, None] = {}
    waiting = [kind for classes in COMMANDS.values() for kind in classes]
    while waiting:
        kind = waiting.pop(0)
        if kind not in found:
            found[kind] = None
            for hint in _hints(kind).values():
                waiting.extend(_classes_in(hint))
    return list(found)


def _classes_in(hint: Any) -> list[type]:
    if is_dataclass(hint):
        return [typing.cast(type, hint)]
    found: list[type] = []
    for inner in typing.get_args(hint):
        found.extend(_classes_in(inner))
    return found


def _hints(kind: type) -> dict[str, Any]:
    """The types of a class's fields, by name."""
    hints = typing.get_type_hints(kind, localns=_ELSEWHERE)
    return {field.name: hints[field.name] for field in fields(kind)}


def _schema_of_class(kind: type) -> dict[str, Any]:
    said = dict(meanings(kind))
    hints = _hints(kind)
    return {
        "type": "object",
        "description": describe(kind),
        "properties": {name: {"description": _in_json(said[name])} | _schema_of(hint) for name, hint in hints.items()},
        "required": list(hints),
    }


def _in_json(text: str) -> str:
    """What a class says of a field to readers of Python, for readers of JSON."""
    return re.sub(r"\bNone\b", "null", text)


def _schema_of(hint: Any) -> dict[str, Any]:
    if is_dataclass(hint):
        return {"$ref": f"#/$defs/{typing.cast(type, hint).__name__}"}
    if hint in _SIMPLE:
        return dict(_SIMPLE[hint])
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_schema_of(each) for each in inner]}
    if issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema_of(inner[1])}
    assert issubclass(origin, Sequence), hint
    return {"type": "array", "items": _schema_of(inner[0])}


def _words(hint: Any) -> str:
    """A type in the words of JSON."""
    if is_dataclass(hint):
        name = typing.cast(type, hint).__name__
        return f"[{name}](#{name.lower()})"
    if hint in _SIMPLE:
        return str(_SIMPLE[hint]["type"])
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{each}`" for each in inner)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(each) for each in inner)
    if issubclass(origin, Mapping):
        return f"object: {_words(inner[1])} by name"
    return f"list of {_words(inner[0])}"


if __name__ == "__main__":
    main()
