"""docs/package-format.md says what the manifest's classes say."""

from __future__ import annotations

import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "package_format.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_page_is_what_the_classes_say(script: dict[str, Any]) -> None:
    page = script["PAGE"].read_text("utf-8")
    assert page == script["render"](page), "run python scripts/package_format.py --write"


def test_every_field_of_the_manifest_is_explained(script: dict[str, Any]) -> None:
    tables = script["make_tables"]()
    for kind in [*script["_CLASSES"].values(), *script["KINDS"].values(), *script["ROLES"].values()]:
        meanings = dict(script["meanings"](kind))
        assert set(meanings) == {field.name for field in fields(kind)}
        for name in meanings:
            assert re.search(rf"`{name}`", tables)
