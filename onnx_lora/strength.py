"""How strong an adapter is in a blend: one number, or one for each of some groups of modules, as people of diffusion
models set it by block. It knows names and numbers, and no tensor.

A group is a run of whole parts of modules' names: `down_blocks`, `unet.down_blocks.1`, `attn2`. Of the groups that a
module is in, the one with the most parts counts. `"*"` is every other module; without it the others have 1.0, as in
diffusers' `set_adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from onnx_lora.arguments import is_finite_number

__all__ = ["REST", "Strength", "Weight", "as_strength", "say_weight", "weight_in", "weight_problem"]

# As a caller may give it; and as it is kept: a number, or something that can be a key.
Weight: TypeAlias = "float | Mapping[str, float]"

# The group of the modules that are in no other.
REST = "*"


@dataclass(frozen=True)
class Strength:
    """A weight for each group of modules, sorted by name, and for the rest of them."""

    groups: tuple[tuple[str, float], ...]
    rest: float = 1.0

    def of(self, module: str) -> float:
        """The weight of a module."""
        found = self.matching(module)
        return found[0][1] if found else self.rest

    def matching(self, module: str) -> list[tuple[str, float]]:
        """The groups that a module is in and that have the most parts."""
        dotted = f".{module}."
        own = [(name, weight) for name, weight in self.groups if f".{name}." in dotted]
        most = max((name.count(".") for name, _ in own), default=0)
        return [(name, weight) for name, weight in own if name.count(".") == most]

    def __str__(self) -> str:
        parts = [f"{name}: {weight:g}" for name, weight in self.groups]
        return "{" + ", ".join([*parts, f"{REST}: {self.rest:g}"]) + "}"


def weight_problem(weight: object) -> str | None:
    """Why it is no weight, completing "must be ..."; None: it is one."""
    if not isinstance(weight, Mapping):
        return None if is_finite_number(weight) else f"a finite number, and is {weight!r}"
    if not weight:
        return "a number, or numbers by groups of modules, and is empty"
    for name, value in weight.items():
        if not isinstance(name, str) or not name.strip("."):
            return f"numbers by groups of modules, and has a group {name!r}"
        if not is_finite_number(value):
            return f"finite numbers by groups of modules, and {name!r} has {value!r}"
    return None


def as_strength(weight: Weight | Strength) -> float | Strength:
    """A weight as it is kept. It must be one (`weight_problem`)."""
    if isinstance(weight, Strength):
        return weight
    if not isinstance(weight, Mapping):
        return float(weight)
    groups = sorted((name.strip("."), float(value)) for name, value in weight.items() if name != REST)
    rest = float(weight.get(REST, 1.0))
    return Strength(tuple(groups), rest) if groups else rest


def weight_in(weight: float | Strength, module: str) -> float:
    """The weight of a module."""
    return weight.of(module) if isinstance(weight, Strength) else weight


def say_weight(weight: float | Strength) -> str:
    """A weight in words."""
    return str(weight) if isinstance(weight, Strength) else f"{weight:g}"
