"""What a method of PEFT is to the reader: the names of its tensors and fields, and a function that makes of a module's
tensors what `Adapter` holds. It knows no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from onnx_lora.adapters.adapter import Change, Delta, MatrixDelta, Replacement
from onnx_lora.adapters.formats.files.reading import shown
from onnx_lora.adapters.formats.peft.keys import Names
from onnx_lora.adapters.formats.peft.rules import PeftConfig
from onnx_lora.points import Array

__all__ = ["Method", "Module", "Part", "TensorError"]


class TensorError(Exception):
    """Tensors of a module that make no sense for its method; the text says which and why."""


@dataclass(frozen=True)
class Module:
    """A module's tensors in the file, by PEFT's names, and those that it shares with all others.

    `read`: the names of those that were asked for. One that never was is not applied, and so it is refused.
    """

    name: str
    tensors: Mapping[str, Array]
    shared: Mapping[str, Array]
    config: PeftConfig
    read: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str, axes: int | None = None) -> Array:
        """Raises TensorError: none of that name, or with another number of axes."""
        where = self.tensors if name in self.tensors else self.shared
        if name not in where:
            raise TensorError(f"has no {name}; get the whole file")
        self.read.add(name)
        if axes is not None and where[name].ndim != axes:
            raise TensorError(f"{name} must have {axes} axes, and has shape {where[name].shape}")
        return where[name]

    def vector(self, name: str) -> Array:
        """A tensor of any number of axes, all but one of them of size 1, as `[n]`."""
        values = self.tensor(name)
        if values.size != max(values.shape, default=0):
            raise TensorError(f"{name} must be a vector, and has shape {values.shape}")
        return values.reshape(-1)

    def number(self, key: str, *, least: float = 0) -> float:
        """A number of the config. Raises TensorError: none, or one below `least`."""
        value = self.config.fields.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < 1e30:
            return value
        raise TensorError(f"{key} of the config must be a number of at least {least:g}, and is {shown(value)}")

    def count(self, key: str, *, least: int = 1) -> int:
        """A whole number of the config. Raises TensorError."""
        value = self.number(key, least=least)
        if value != int(value):
            raise TensorError(f"{key} of the config must be a whole number, and is {value}")
        return int(value)

    def must(self, holds: bool, text: str) -> None:
        """Raises TensorError, with the shapes of all tensors, unless it holds."""
        if not holds:
            shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in sorted(self.tensors.items()))
            raise TensorError(f"{text}; has {shapes}")


@dataclass(frozen=True)
class Part:
    """What a module's tensors come to. `note`: what a reader should know of it."""

    delta: Delta | MatrixDelta | None = None
    change: Change | None = None
    whole: Mapping[str, Replacement] = field(default_factory=dict)  # by parameter
    note: str = ""


@dataclass(frozen=True)
class Method:
    """One `peft_type`.

    `unread`: tensors that PEFT writes and no forward pass reads. `integers`: those that may hold integers. `harmless`:
    fields that never change what a trained adapter computes, or that `build` reads; `refused`: others, and why. `rank`
    and `alpha`: the fields that hold them. `patterns`: whether rank_pattern and alpha_pattern map names to numbers.
    """

    name: str
    names: Names
    build: Callable[[Module], Part]
    harmless: frozenset[str] = frozenset()
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    rank: str = ""
    alpha: str = ""
    patterns: bool = False
    integers: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
