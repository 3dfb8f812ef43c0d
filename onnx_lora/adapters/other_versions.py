"""What transformers 4 and transformers 5 call the modules of one checkpoint, where they differ. It knows names only.

The table is made from transformers' own conversions by `scripts/other_versions.py`; a test compares its names with the
models of the installed version."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

__all__ = ["other_names", "read_table"]

# A number in the table.
_NUMBER = "#"


@cache
def read_table() -> Mapping[str, Mapping[str, str]]:
    """By type of model (`model_type` of a config), by the newer name of a module: its older one. In both `#` stands for
    a number; the numbers are the same, in one order. Names begin where those of the model without a head do."""
    table: Mapping[str, Mapping[str, str]] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    return table


@dataclass(frozen=True)
class _Renaming:
    """One module's name in two versions. What is in front of it stays."""

    own: str
    other: str

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts = map(re.escape, self.own.split(_NUMBER))
        return re.compile(r"((?:.+\.)?)" + r"(\d+)".join(parts))

    def rename(self, name: str) -> str | None:
        """The other version's name; None: this is no name of that module."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        front, *numbers = match.groups()
        first, *rest = self.other.split(_NUMBER)
        return front + first + "".join(number + part for number, part in zip(numbers, rest, strict=True))


@cache
def _renamings(kind: str) -> Mapping[str, Sequence[_Renaming]]:
    """Those of one type of models, from either version to the other, by the last part of the own name."""
    found: dict[str, list[_Renaming]] = {}
    for newer, older in read_table().get(kind, {}).items():
        for renaming in (_Renaming(newer, older), _Renaming(older, newer)):
            found.setdefault(_last_part(renaming.own), []).append(renaming)
    return found


def other_names(name: str, kinds: Collection[str]) -> list[str]:
    """The names that a module of models of these types may have in the other version, each once."""
    found: dict[str, None] = {}
    for kind in kinds:
        for renaming in _renamings(kind).get(_last_part(name), ()):
            other = renaming.rename(name)
            if other is not None:
                found[other] = None
    return list(found)


def _last_part(name: str) -> str:
    last = name.rpartition(".")[2]
    return _NUMBER if last.isdecimal() else last
