"""Regular expressions that others wrote, on names: the answers of `re`, in bounded time. It knows no rule of PEFT's.

`re` tries one way through an expression after the other, and `(a+)+b` has 2^n ways. Here all places of a name that the
parts so far can end at are one number, a bit for each place. A part takes such a number and gives the next one, so that
each part is followed once a repetition, however many ways lead to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

# Python's own parser and compiler of expressions: private in name, and the same for twenty years. What they say that is
# not known here is refused.
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any, Protocol

__all__ = ["Expression", "ExpressionError", "Work"]

# With the names of all modules of a model in one alternation an expression has some thousand characters.
_LONGEST = 20_000

# What `Work` allows without being told otherwise: about five seconds. 10,000 names in an expression of 300 characters,
# as long as those that tools write, take 5 % of it.
_STEPS = 20_000_000

# Characters of a text that a message shows.
_SHOWN = 60


class ExpressionError(Exception):
    """A text is no expression, or an expression is refused; the message says which, and why."""


@dataclass
class Work:
    """What matching may still cost, all expressions of a file together."""

    left: int = _STEPS  # steps: one part of an expression, or one character of it, on one name
    _last: _Text | None = None

    def text(self, name: str) -> _Text:
        """The name, ready to be looked at: made once for all expressions that meet it in a row."""
        if self._last is None or self._last.name != name:
            self._last = _Text(name, self)
        return self._last

    def spend(self, steps: int) -> None:
        """Raises ExpressionError: it is used up."""
        self.left -= steps
        if self.left < 0:
            raise ExpressionError(
                "its expressions take too many steps on these names; write names in their place, or simpler expressions"
            )


class Expression:
    """A regular expression of Python's, with its meaning."""

    def __init__(self, text: str, work: Work | None = None) -> None:
        """Raises ExpressionError: no expression, too long, or with what bounded time cannot have: references to groups,
        and parts that give nothing back (atomic groups, possessive repetitions)."""
        shown = repr(text[:_SHOWN])
        if len(text) > _LONGEST:
            raise ExpressionError(f"{shown}… has {len(text)} characters, and at most {_LONGEST} are read")
        self._work = work or Work()
        try:
            re.compile(text)  # what only compiling finds wrong
            parsed = _parser.parse(text)
            self._tree = _build_sequence(parsed, parsed.state.flags)
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise ExpressionError(f"{shown} is no regular expression: {error}") from error

    def fullmatch(self, name: str) -> bool:
        """Whether it matches all of `name`. Raises ExpressionError: too much work."""
        return self._ends(name, 0) >> len(name) & 1 == 1

    def match(self, name: str) -> bool:
        """Whether it matches a beginning of `name`. Raises ExpressionError: too much work."""
        return self._ends(name, 0) != 0

    def ends(self, name: str, start: int) -> list[int]:
        """Where what it matches from `start` on can end, in rising order. Raises ExpressionError: too much work."""
        reached = self._ends(name, start)
        return [place for place in range(start, len(name) + 1) if reached >> place & 1]

    def _ends(self, name: str, start: int) -> int:
        try:
            return self._tree.reach(self._work.text(name), 1 << start, back=False)
        except RecursionError as error:
            raise ExpressionError(f"an expression of groups in too many groups: {error}") from error


@dataclass
class _Text:
    """A name that is looked at. Sets of places in it are numbers: bit i is the place before character i."""

    name: str
    work: Work
    of_leaves: dict[_Leaf, int] = field(default_factory=dict)  # the places where each holds

    @cached_property
    def characters(self) -> Mapping[str, int]:
        """The places of every character that there is."""
        found: dict[str, int] = {}
        for place, character in enumerate(self.name):
            found[character] = found.get(character, 0) | 1 << place
        return found

    def spend(self, steps: int) -> None:
        """Raises ExpressionError. Long names are long numbers, and each step takes longer."""
        self.work.spend(steps * (1 + len(self.name) // 128))

    @cached_property
    def everywhere(self) -> int:
        """All places, the one behind the last character too."""
        return (2 << len(self.name)) - 1


class _Part(Protocol):
    """A part of an expression."""

    def reach(self, text: _Text, places: int, *, back: bool) -> int:
        """The places where this part can end, if it begins at one of `places`. `back`: the places where it can begin,
        if it ends at one of them."""


@dataclass(frozen=True, eq=False)
class _Leaf:
    """One character of some kind, or, of width 0, what must hold between two."""

    pattern: re.Pattern[str]
    width: int

    def reach(self, text: _Text, places: int, *, back: bool) -> int:
        holds = self.holds(text)
        if not self.width:
            return places & holds
        return places >> 1 & holds if back else (places & holds) << 1

    def holds(self, text: _Text) -> int:
        """The places where it holds."""
        known = text.of_leaves.get(self)
        if known is None:
            known = text.of_leaves[self] = self._look(text)
        return known

    def _look(self, text: _Text) -> int:
        text.spend(len(text.characters if self.width else text.name))
        holding = 0
        if self.width:
            for character, places in text.characters.items():
                if self.pattern.fullmatch(character):
                    holding |= places
        else:
            for place in range(len(text.name) + 1):
                if self.pattern.match(text.name, place):
                    holding |= 1 << place
        return holding


@dataclass(frozen=True)
class _Word:
    """Characters in a row: a sequence of leaves, and quicker."""

    characters: str

    def reach(self, text: _Text, places: int, *, back: bool) -> int:
        text.spend(len(self.characters))
        for character in reversed(self.characters) if back else self.characters:
            holds = text.characters.get(character, 0)
            places = places >> 1 & holds if back else (places & holds) << 1
            if not places:
                break
        return places


@dataclass(frozen=True)
class _Run:
    """Any number of one leaf's characters: a repetition, in as many steps as the name's length has binary digits."""

    leaf: _Leaf

    def reach(self, text: _Text, places: int, *, back: bool) -> int:
        whole, length = self.leaf.holds(text), 1  # where as many characters in a row hold
        while whole:
            places |= places >> length & whole if back else (places & whole) << length
            whole &= whole >> length
            length *= 2
        return places


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Part, ...]

    def reach(self, text: _Text, places: int, *, back: bool) -> int:
        for part in reversed(self.parts) if back else self.parts:
            text.spend(1)
            places = part.reach(text, places, back=back)
            if not places:
                break
        return places


@dataclass(frozen=True)
class _Either:
    choices: tuple[_Part, ...]

    def reach(self, text: _Text, places: int, *, back: bool) -> int:
        text.spend(len(self.choices))
        reached = 0
        for choice in self.choices:
            reached |= choice.reach(text, places, back=back)
        return reached


@dataclass(frozen=True)
class _Repeat:
    part: _Part
    least: int
    most: int

    def reach(self, text: _Text, places: int, *, back: bool) -> int:
        for _ in range(self.least):
            before = places
            places = self._once(text, before, back=back)
            if places in (0, before):
                break
        reached = new = places
        for _ in range(self.most - self.least):
            new = self._once(text, new, back=back) & ~reached
            if not new:
                break
            reached |= new
        return reached

    def _once(self, text: _Text, places: int, *, back: bool) -> int:
        text.spend(1)
        return self.part.reach(text, places, back=back)


@dataclass(frozen=True)
class _Look:
    """What must stand behind a place, or before it; or must not, where it is not `wanted`."""

    part: _Part
    ahead: bool
    wanted: bool

    def reach(self, text: _Text, places: int, *, back: bool) -> int:
        del back
        holds = self.part.reach(text, text.everywhere, back=self.ahead)
        return places & (holds if self.wanted else ~holds)


_ONE = frozenset({_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN})
_REPEATS = frozenset({_constants.MAX_REPEAT, _constants.MIN_REPEAT})
_LOOKS = frozenset({_constants.ASSERT, _constants.ASSERT_NOT})

# What is refused, in words that a reader knows better than the parser's own.
_REFUSED = {
    _constants.GROUPREF: "a reference to a group",
    _constants.GROUPREF_EXISTS: "a condition on a group",
    _constants.ATOMIC_GROUP: "an atomic group",
    _constants.POSSESSIVE_REPEAT: "a possessive repetition",
}


def _build_sequence(nodes: Sequence[tuple[Any, Any]], flags: int) -> _Part:
    """Parts in a row. Raises ExpressionError."""
    parts: list[_Part] = []
    for kind, argument in nodes:
        part = _build_part(kind, argument, flags)
        before = parts[-1] if parts else None
        if isinstance(part, _Word) and isinstance(before, _Word):
            parts[-1] = _Word(before.characters + part.characters)
        else:
            parts.append(part)
    return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))


def _build_part(kind: Any, argument: Any, flags: int) -> _Part:
    """A part of what the parser gives. Raises ExpressionError: none that bounded time can have."""
    if kind is _constants.LITERAL and not flags & re.IGNORECASE:
        return _Word(chr(argument))
    if kind in _ONE:
        return _build_leaf(kind, argument, flags, width=1)
    if kind is _constants.AT:
        return _build_leaf(kind, argument, flags, width=0)
    if kind is _constants.SUBPATTERN:
        _, added, removed, inner = argument
        return _build_sequence(inner, (flags | added) & ~removed)
    if kind is _constants.BRANCH:
        return _Either(tuple(_build_sequence(choice, flags) for choice in argument[1]))
    if kind in _REPEATS:
        least, most, nodes = argument
        return _build_repeat(_build_sequence(nodes, flags), least, most)
    if kind in _LOOKS:
        direction, inner = argument
        return _Look(_build_sequence(inner, flags), direction > 0, kind is _constants.ASSERT)
    if kind is _constants.FAILURE:
        return _Either(())
    raise ExpressionError(f"has {_REFUSED.get(kind, kind)}, which is not read: nothing bounds how long it takes")


def _build_repeat(part: _Part, least: int, most: int) -> _Part:
    if most is not _constants.MAXREPEAT or not isinstance(part, _Leaf) or not part.width:
        return _Repeat(part, least, most)
    run = _Run(part)
    return run if not least else _Sequence((_Repeat(part, least, least), run))


def _build_leaf(kind: Any, argument: Any, flags: int, *, width: int) -> _Leaf:
    state = _parser.State()
    state.flags = flags
    return _Leaf(_compiler.compile(_parser.SubPattern(state, [(kind, argument)])), width)
