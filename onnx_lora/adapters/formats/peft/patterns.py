"""Lists of names and expressions in a PEFT config: which of many a module meets, without a look at each of them. It
knows no field.

The reference is PEFT 0.21: `get_pattern_key`, `check_target_module_exists`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from onnx_lora.expressions import Expression, ExpressionError, Work

__all__ = ["Patterns"]

# How PEFT wraps the expressions of rank_pattern and alpha_pattern, and those of modules_to_save.
_WRAPPERS = {"at end": r"(.*\.)?({})$", "around": r"(^|.*\.){}($|\..*)"}

# Expressions of one list that are no plain names. Each of them is a look at every module.
_MOST = 1000

# An expression that is a plain name: `.` is any character, and `\.` a dot; other marks may have a `\` too.
_NAME = re.compile(r"(?P<begin>\^?)(?P<name>(?:[^\\^$*+?{}\[\]|()]|\\\W)*)(?P<end>\$?)")

# Any character, in the tables of plain names. No tensor's name has it.
_ANY = "\0"


@dataclass(frozen=True)
class _Form:
    """What plain names of one length have in common.

    `at_begin`, `at_end`: they match at the beginning, at the end of a module's name only. `wildcards`: the places at
    which they have a `.`, which is any character.
    """

    at_begin: bool
    at_end: bool
    wildcards: tuple[int, ...]

    def mask(self, name: str) -> str:
        """The name with `_ANY` at the places of the wildcards, as the table of this form has it."""
        characters = list(name)
        for place in self.wildcards:
            characters[place] = _ANY
        return "".join(characters)


class Patterns:
    """Expressions in an order, each wrapped as PEFT does it; plain names among them are looked up."""

    def __init__(self, texts: Sequence[str], where: Literal["at end", "around"], work: Work | None = None) -> None:
        """Raises ExpressionError: one of them is no expression, or there are too many that are no names."""
        self._inside = where == "around"
        self._work = work or Work()
        self._names: dict[int, dict[_Form, dict[str, list[int]]]] = {}  # by length, form and name
        self._expressions: list[tuple[int, Expression]] = []
        for number, text in enumerate(texts):
            plain = _NAME.fullmatch(text)
            if plain:
                self._put_name(number, plain)
                continue
            wrapped = _WRAPPERS[where].replace("{}", text)
            self._expressions.append((number, Expression(wrapped, self._work)))
            if len(self._expressions) > _MOST:
                raise ExpressionError(f"has more than {_MOST} expressions; write the modules' names")

    def _put_name(self, number: int, plain: re.Match[str]) -> None:
        """Put a plain name, a match of `_NAME`, into the table of its length and form."""
        letters: list[str] = re.findall(r"\\.|.", plain["name"], re.DOTALL)
        wildcards = [place for place, letter in enumerate(letters) if letter == "."]
        form = _Form(plain["begin"] != "", plain["end"] != "", tuple(wildcards))
        name = form.mask("".join(letter[-1] for letter in letters))  # `\.` without its `\`
        forms = self._names.setdefault(len(letters), {})
        numbers = forms.setdefault(form, {}).setdefault(name, [])
        numbers.append(number)

    def first(self, module: str) -> int | None:
        """The number of the first that matches, or None. Raises ExpressionError: too much work."""
        best = min(self._plain(module), default=None)
        for number, expression in self._expressions:
            if best is not None and number > best:
                break
            if expression.match(module):
                return number
        return best

    def all(self, module: str) -> list[int]:
        """The numbers of all that match. Raises ExpressionError: too much work."""
        found = set(self._plain(module))
        for number, expression in self._expressions:
            if expression.match(module):
                found.add(number)
        return sorted(found)

    def _plain(self, module: str) -> Iterator[int]:
        """The numbers of the plain names that match."""
        for start, end in self._pieces(module):
            for form, names in self._names.get(end - start, {}).items():
                self._work.spend(1)
                is_too_late = form.at_begin and start > 0
                is_too_early = form.at_end and end < len(module)
                if is_too_late or is_too_early:
                    continue
                name = form.mask(module[start:end])
                yield from names.get(name, ())

    def _pieces(self, module: str) -> Iterator[tuple[int, int]]:
        """Where a plain name may stand: at the end, behind a dot; or between any two."""
        dots = [place for place, character in enumerate(module) if character == "."]
        starts = [0, *(dot + 1 for dot in dots)]
        ends = [len(module)]
        if self._inside:
            ends = [*dots, len(module)]
        for start in starts:
            for end in ends:
                if end >= start:
                    yield start, end
