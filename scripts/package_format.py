"""Writes the tables of docs/package-format.md, made of the manifest's classes and what these say of their fields.

`python scripts/package_format.py` prints the page as it must be; `--write` puts it in its place. A test compares.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "package-format.md"

sys.path.insert(0, str(ROOT))

from onnx_lora.codec import NEEDED_SINCE  # noqa: E402
from onnx_lora.kinds import KINDS  # noqa: E402
from onnx_lora.manifest import FORMAT_VERSION, GraphInfo, KnownWeight, Manifest, Unplaced  # noqa: E402
from onnx_lora.older_manifests import OLDEST_VERSION  # noqa: E402
from onnx_lora.points import (  # noqa: E402
    Branch,
    InjectionPoint,
    NamedTensor,
    Quantization,
    StoredTensor,
    WeightPart,
    WholeWeight,
)
from onnx_lora.quantized import Scheme  # noqa: E402
from onnx_lora.roles import ROLES  # noqa: E402
from scripts.field_docs import describe, meanings  # noqa: E402

_BEGIN = "<!-- what follows is made by scripts/package_format.py -->"
_END = "<!-- what follows is written by hand -->"

# In the order in which a reader meets them.
_CLASSES: Mapping[str, type] = {
    "The manifest": Manifest,
    "A graph": GraphInfo,
    "A point": InjectionPoint,
    "A part of a weight": WeightPart,
    "A stored tensor": StoredTensor,
    "What is quantized": Quantization,
    "A scheme": Scheme,
    "A named tensor": NamedTensor,
    "A branch": Branch,
    "A replaceable weight": WholeWeight,
    "An unplaced node": Unplaced,
    "A weight without a point": KnownWeight,
}

# What the types of fields are called in JSON.
_WORDS = {
    "int": "number",
    "str": "text",
    "bool": "true or false",
    "dict[str, str]": "texts by name",
    "InjectionPoint": "a point",
    "WholeWeight": "a replaceable weight",
    "GraphInfo": "a graph",
    "Branch": "a branch",
    "Unplaced": "an unplaced node",
    "KnownWeight": "a weight without a point",
    "WeightPart": "a part of a weight",
    "StoredTensor": "a stored tensor",
    "NamedTensor": "a named tensor",
    "Quantization": "what is quantized",
    "Scheme": "a scheme",
    "Kind": "a kind",
    "Role": "a role",
    "Bias": "`added`, `none` or `unknown`",
}

_MANY = {
    "int": "numbers",
    "str": "texts",
    "GraphInfo": "graphs",
    "InjectionPoint": "points",
    "Branch": "branches",
    "WholeWeight": "replaceable weights",
    "Unplaced": "unplaced nodes",
    "KnownWeight": "weights without a point",
    "WeightPart": "parts of a weight",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    page = render(PAGE.read_text("utf-8"))
    if parser.parse_args().write:
        PAGE.write_text(page, "utf-8")
    else:
        sys.stdout.write(page)


def render(page: str) -> str:
    """The page with its tables made anew; what is written by hand stays."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    before = re.sub(r"(?<=^# The package format, version )\d+", str(FORMAT_VERSION), before)
    return f"{before}{_BEGIN}\n\n{make_tables()}\n{_END}{after}"


def make_tables() -> str:
    """One table for each class of the manifest, and one for the kinds and the roles."""
    parts = [
        f"Today's format is {FORMAT_VERSION}; formats {OLDEST_VERSION} to {FORMAT_VERSION} are read, and upgraded in "
        "memory. A field in *italics* may be left out: what is meant then stands beside its type.\n"
    ]
    for title, kind in _CLASSES.items():
        parts.append(f"### {title}\n\n{describe(kind)}\n\n{_table(kind)}\n")
    named = "The object has a `name`, and the fields that stand beside it here."
    parts.append(f"### A kind\n\nWhat a module computes. {named}\n\n{_names(KINDS)}\n")
    parts.append(f"### A role\n\nWhat a parameter is to its module. {named}\n\n{_names(ROLES)}\n")
    return "\n".join(parts)


def _table(kind: type) -> str:
    rows = ["| field | type | |", "|---|---|---|"]
    said = dict(meanings(kind))
    for field in fields(kind):
        name = f"`{field.name}`" if field.default is MISSING else f"*`{field.name}`*"
        rows.append(f"| {name} | {_type(str(field.type))}{_default(field)} | {_meaning(field, said)} |")
        if field.name == "format_version":  # of the writer's, and not kept: what it says follows from the graphs
            rows.append(f"| *`minimum_reader`* | number (`format_version`) | {Manifest.minimum_reader.__doc__} |")
    return "\n".join(rows)


def _meaning(field: Field[Any], said: Mapping[str, str]) -> str:
    since = field.metadata.get(NEEDED_SINCE)
    return said[field.name] + (f" Readers of format {since} know it." if since else "")


def _type(written: str) -> str:
    """A field's type in the words of JSON."""
    optional = written.removesuffix(" | None")
    if optional != written:
        return f"{_type(optional)}, or left out"
    if literal := re.fullmatch(r"Literal\[(.*)\]", written):
        return " or ".join(f"`{each.strip()[1:-1]}`" for each in literal[1].split(","))
    if several := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", written):
        return f"a list of {_MANY[several[1]]}"
    return _WORDS[written]


def _default(field: Field[Any]) -> str:
    if field.default is MISSING or field.default is None:
        return ""
    if field.default == ():
        return " (empty)"
    name = getattr(field.default, "name", field.default)
    if name is False:
        return " (false)"
    return f" ({name})" if name != "" else " (empty)"


def _names(classes: Mapping[str, type]) -> str:
    rows = ["| `name` | fields | |", "|---|---|---|"]
    for name, kind in classes.items():
        own = []
        said = dict(meanings(kind))
        for field in fields(kind):
            own.append(f"`{field.name}`: {_type(str(field.type))}{_default(field)}. {said[field.name]}")
        rows.append(f"| `{name}` | {' '.join(own)} | {' '.join(describe(kind).split())} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
