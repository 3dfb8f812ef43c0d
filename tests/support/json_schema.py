"""What commands print, checked against docs/results.schema.json by a validator that we did not write."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

_SCHEMA = Path(__file__).parent.parent.parent / "docs" / "results.schema.json"


@cache
def _validator(command: str) -> Any:
    schema = json.loads(_SCHEMA.read_text("utf-8"))
    assert command in schema["$defs"], f"the schema says nothing of {command}"
    return jsonschema.Draft202012Validator(schema | {"$ref": f"#/$defs/{command}"})


def check_result(command: str, body: Any) -> None:
    """Fails where what a command printed is not what the schema says. `command`: its name, or "error"."""
    _validator(command).validate(body)
