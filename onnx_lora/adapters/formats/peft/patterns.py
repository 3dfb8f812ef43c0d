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
    """What plain names of one length have in common. `any`: where they have any character."""

    begin: bool  # only at the beginning of a module's name
    end: bool
    any: tuple[int, ...]

    def of(self, name: str) -> str:
        """`name` as the table of this form has it."""
        pieces, done = [], 0
        for place in self.any:
            pieces.append(name[done:place])
            done = place + 1
        return _ANY.join([*pieces, name[done:]])


class Patterns:
    """Expressions in an order, each wrapped as PEFT does it; plain names among them are looked up."""

    def __init__(self, texts: Sequence[str], where: Literal["at end", "around"], work: Work | None = None) -> None:
        """Raises ExpressionError: one of them is no expression, or there are too many that are no names."""
        self._inside, self._work = where == "around", work or Work()
        self._names: dict[int, dict[_Form, dict[str, list[int]]]] = {}  # by length
        self._expressions: list[tuple[int, Expression]] = []
        for number, text in enumerate(texts):
            if plain := _NAME.fullmatch(text):
                self._put(number, plain)
            else:
                self._expressions.append((number, Expression(_WRAPPERS[where].replace("{}", text), self._work)))
            if len(self._expressions) > _MOST:
                raise ExpressionError(f"has more than {_MOST} expressions; write the modules' names")

    def _put(self, number: int, plain: re.Match[str]) -> None:
        letters = re.findall(r"\\.|.", plain["name"], re.DOTALL)
        form = _Form(
            plain["begin"] != "", plain["end"] != "", tuple(i for i, letter in enumerate(letters) if letter == ".")
        )
        name = form.of("".join(letter[-1] for letter in letters))
        self._names.setdefault(len(letters), {}).setdefault(form, {}).setdefault(name, []).append(number)

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
        matching = [number for number, expression in self._expressions if expression.match(module)]
        return sorted({*self._plain(module), *matching})

    def _plain(self, module: str) -> Iterator[int]:
        for start, end in self._pieces(module):
            for form, names in self._names.get(end - start, {}).items():
                self._work.spend(1)
                if (start and form.begin) or (end < len(module) and form.end):
                    continue
                yield from names.get(form.of(module[start:end]), ())

    def _pieces(self, module: str) -> Iterator[tuple[int, int]]:
        """Where a plain name may stand: at the end, behind a dot; or between any two."""
        dots = [place for place, character in enumerate(module) if character == "."]
        ends = [*dots, len(module)] if self._inside else [len(module)]
        for start in (0, *(dot + 1 for dot in dots)):
            yield from ((start, end) for end in ends if end >= start)
