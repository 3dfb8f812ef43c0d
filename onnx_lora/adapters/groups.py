"""Groups of modules that a blend weighs: whether an adapter has modules in them, and each module one weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from onnx_lora.adapters.problems import list_first
from onnx_lora.strength import Strength

if TYPE_CHECKING:
    from onnx_lora.adapters.adapter import BoundAdapter

__all__ = ["group_problems"]

_MOST_NAMES = 8  # in a message


def group_problems(adapter: BoundAdapter, weight: float | Strength) -> list[str]:
    """Groups that none of the adapter's modules are in, and modules that are in two groups of the same size and other
    weights."""
    if not isinstance(weight, Strength):
        return []
    modules = [*adapter.coverage.applied, *(name.rpartition(".")[0] for name in adapter.coverage.replaced)]
    problems: list[str] = []
    for name, _ in weight.groups:
        if not any(f".{name}." in f".{module}." for module in modules):
            there = list_first(_parts_of(modules), _MOST_NAMES)
            problems.append(f"{adapter.name}: no module of it is in a group {name!r}; parts of their names are {there}")
    for module in modules:
        found = weight.matching(module)
        if len({value for _, value in found}) > 1:
            names = " and ".join(repr(name) for name, _ in found)
            problems.append(f"{module}: is in the groups {names}, of different weights; give one of them more parts")
    return problems


def _parts_of(modules: Iterable[str]) -> list[str]:
    """The parts that modules' names are made of, those that most names have first; numbers left out."""
    counts: dict[str, int] = {}
    for module in modules:
        for part in dict.fromkeys(module.split(".")):
            if not part.isdecimal():
                counts[part] = counts.get(part, 0) + 1
    return sorted(counts, key=lambda part: -counts[part])
