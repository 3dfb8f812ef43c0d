"""What a call asks for: the base, an adapter, a blend, or one of these per row. It turns the `adapter`
argument into names and weights; it knows no tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeAlias, cast

from onnx_lora.errors import SelectionError
from onnx_lora.strength import Strength, Weight, as_strength, weight_problem

__all__ = ["AdapterChoice", "Choice", "Selection", "explain_unknown", "parse"]

# What a caller may write: a name, a blend, or None for the base; or a list of these, one per row.
OneChoice: TypeAlias = str | Mapping[str, float | Mapping[str, float]] | None
AdapterChoice: TypeAlias = OneChoice | list[OneChoice] | tuple[OneChoice, ...]

# Adapters and their weights, by name, sorted: no adapter is the base.
Choice: TypeAlias = tuple[tuple[str, float | Strength], ...]

# Names of adapters in a message.
_MOST_NAMES = 3

_KINDS = "an adapter's name, a mapping from names to weights, or None for the base"


@dataclass(frozen=True, slots=True)
class Selection:
    """One choice for the whole batch, or one for each of its rows.

    `batch`: the number of rows a list was given for; None when it holds for any batch.
    """

    choices: tuple[Choice, ...]
    batch: int | None = None


def parse(adapter: AdapterChoice, loaded: Collection[str]) -> Selection:
    """The selection that `adapter` means. Equal rows are one choice for the whole batch.

    Raises SelectionError: it is no choice, or names an adapter that is not loaded.
    """
    problems: list[str] = []
    if isinstance(adapter, (list, tuple)):
        selection = _parse_rows(adapter, loaded, problems)
    else:
        selection = Selection((_parse_choice(adapter, loaded, "adapter", problems),))
    if problems:
        raise SelectionError("the call's adapter cannot be had", problems=problems)
    return selection


def explain_unknown(name: str, loaded: Collection[str]) -> str:
    """That there is no such adapter, and what there is: all of a few, the closest of many."""
    said = f"no adapter {name!r} is loaded"
    if not loaded:
        return f"{said}; none is"
    if len(loaded) <= _MOST_NAMES:
        return f"{said}; loaded: {', '.join(map(repr, sorted(loaded)))}"
    closest = get_close_matches(name, sorted(loaded), n=_MOST_NAMES, cutoff=0)
    return f"{said}; the closest of {len(loaded)} are {', '.join(map(repr, closest))}"


def _parse_rows(
    adapter: list[OneChoice] | tuple[OneChoice, ...], loaded: Collection[str], problems: list[str]
) -> Selection:
    rows: list[Choice] = []
    for index, row in enumerate(adapter):
        rows.append(_parse_choice(row, loaded, f"row {index}", problems))
    if not rows:
        problems.append("a list must have one choice for every row of the batch, and is empty")
    are_equal = len(set(rows)) == 1
    return Selection(tuple(rows[:1] if are_equal else rows), len(rows))


def _parse_choice(asked: object, loaded: Collection[str], where: str, problems: list[str]) -> Choice:
    if asked is None:
        return ()
    if isinstance(asked, str):
        parts: Mapping[object, object] = {asked: 1.0}
    elif isinstance(asked, Mapping):
        parts = asked
        if not parts:
            problems.append(f"{where}: a blend must name an adapter, and is empty; None asks for the base")
    else:
        problems.append(f"{where}: must be {_KINDS}, and is a {type(asked).__name__}")
        return ()
    choice = []
    for name, weight in parts.items():
        if not isinstance(name, str):
            problems.append(f"{where}: adapters are chosen by name, not by a {type(name).__name__}")
        elif name not in loaded:
            problems.append(f"{where}: {explain_unknown(name, loaded)}")
        else:
            problem = weight_problem(weight)
            if problem is not None:
                problems.append(f"{where}: the weight of {name!r} must be {problem}")
            else:
                choice.append((name, as_strength(cast(Weight, weight))))
    return tuple(sorted(choice, key=lambda part: part[0]))
