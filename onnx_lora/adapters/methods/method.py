"""What a method of fine-tuning is to a reader: the names of its tensors and of its config's fields, and a function that
reads what they do to one module. It knows no method, and no file.

A method is one file of this folder, with an object `METHOD`, and one line in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from onnx_lora.adapters.adapter import Change, Delta, MatrixDelta, Replacement
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.points import Array

__all__ = ["MERGE", "RETRAIN", "Contribution", "DocsRow", "Fields", "Method", "Module", "Refusal", "bare_parameters"]

T = TypeVar("T")

# Factors A and B of a module's bare parameters. No file says in which order they come.
Pairs = tuple[tuple[Array, Array], ...]

# Cures for what is refused.
MERGE = "merge it into the base with PEFT (merge_and_unload) and export that"
RETRAIN = "train without it"

# Larger numbers in a config are nonsense, and float32 holds the largest of them as infinity.
_MOST = 1e30


@dataclass(frozen=True)
class Fields:
    """The fields of a config as the file has them, and what a method made of them once for all modules."""

    values: Mapping[str, Any]
    _made: dict[Callable[[Fields], Any], Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """A field's value; `default` where the config has none."""
        return self.values.get(name, default)

    def once(self, make: Callable[[Fields], T]) -> T:
        """What `make` makes of the fields. It is made for the first module that asks, and kept for the others."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made


@dataclass(frozen=True)
class Module:
    """One module of a file: its tensors by the method's names, those that all modules share, and its numbers.

    `rank` and `alpha`: the config's for this module; 1 where the method has none. `scale`: alpha / rank, or what
    `use_rslora` makes of it. `asked`: the names of the tensors that the method asked for. Another tensor of the module
    is not applied, and so the file is refused.
    """

    name: str
    tensors: Mapping[str, Array]
    shared: Mapping[str, Array]
    fields: Fields
    rank: int
    alpha: float
    scale: float
    asked: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Whether the module has a tensor of this name of its own."""
        return name in self.tensors

    def tensor(self, name: str, axes: int | None = None) -> Array:
        """A tensor of the module, or else one that all modules share.

        Raises TensorError: there is none, or it has another number of axes.
        """
        values = self.tensors.get(name)
        if values is None:
            values = self.shared.get(name)
        if values is None:
            raise TensorError(f"has no {name}; get the whole file")
        self.asked.add(name)
        if axes is not None and values.ndim != axes:
            raise TensorError(f"{name} must have {axes} axes, and has shape {values.shape}")
        return values

    def vector(self, name: str) -> Array:
        """A tensor as `[n]`, of which all axes but one have size 1.

        Raises TensorError: there is none, or more of its axes are longer.
        """
        values = self.tensor(name)
        if values.size != max(values.shape, default=0):
            raise TensorError(f"{name} must be a vector, and has shape {values.shape}")
        return values.reshape(-1)

    def number(self, key: str, *, least: float = 0) -> float:
        """A number of the config. Raises TensorError: there is none, or one below `least`."""
        value = self.fields.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and least <= value < _MOST:
            number: float = value
            return number
        raise TensorError(f"{key} of the config must be a number of at least {least:g}, and is {abbreviate(value)}")

    def count(self, key: str, *, least: int = 1) -> int:
        """A whole number of the config. Raises TensorError: there is none, or one below `least`."""
        value = self.number(key, least=least)
        if value != int(value):
            raise TensorError(f"{key} of the config must be a whole number, and is {value}")
        return int(value)

    def must(self, holds: bool, text: str) -> None:
        """Raises TensorError: it does not hold. The message is `text`, with the shapes of the module's tensors."""
        if holds:
            return
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in sorted(self.tensors.items()))
        raise TensorError(f"{text}; has {shapes}")

    def must_have_rank(self, found: int) -> None:
        """Raises TensorError: the rank of its tensors is not the config's."""
        self.must(found == self.rank, f"the rank must be {self.rank} by adapter_config.json, and is {found}")


@dataclass(frozen=True)
class Contribution:
    """What one module's tensors contribute to the adapter; nothing where the module stays at the base.

    `whole`: what they do to whole parameters, by name. `note`: what a user should know of the module, and cannot see in
    the tensors.
    """

    delta: Delta | MatrixDelta | None = None
    change: Change | None = None
    whole: Mapping[str, Replacement] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a field of a config is refused, and what to do about it."""

    reason: str
    cure: str


@dataclass(frozen=True)
class DocsRow:
    """A row of the table in `docs/adapters.md`: what an adapter's config says, and how that is applied."""

    option: str
    applied: str


@dataclass(frozen=True)
class Method:
    """One method, by what its files hold and what that does.

    `peft_type`: its name in a config, and in the registry. `name`: the one that people use.
    `read`: reads what a module's tensors do; it raises TensorError where they make no sense.
    `docs`: its rows of the table in the documentation.

    `of_parameters`: makes the change of a bare parameter of a module (`target_parameters`) out of the module's pairs of
    factors, a rank and a scale. None: the method has no such parameters.

    Tensors. `tensors`: those of a module by name, each with the endings that it may have behind an adapter's name:
    "weight", or none for a bare parameter (`bare_parameters`). `shared`: those that a file has once for all modules.
    `integers`: those that may hold whole numbers. `unread`: those that no forward pass reads.

    Fields of the config. `fields`: those that are understood, because `read` reads them or because they never change
    what a trained adapter computes. `refused`: those that must be empty. Every other field is refused as unknown.
    `rank` and `alpha`: the fields that hold the rank and alpha, if any. `patterns`: whether `rank_pattern` and
    `alpha_pattern` map names of modules to numbers. `variants`: what people call the method where a field is set, by
    field; the first field that is set counts.
    """

    peft_type: str
    name: str
    read: Callable[[Module], Contribution]
    docs: tuple[DocsRow, ...]
    tensors: Mapping[str, Collection[str]]
    shared: Collection[str] = ()
    of_parameters: Callable[[Pairs, int, float], Change] | None = None
    integers: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    rank: str | None = None
    alpha: str | None = None
    patterns: bool = False
    variants: Mapping[str, str] = field(default_factory=dict)


def bare_parameters(*names: str) -> dict[str, Collection[str]]:
    """Tensors that are bare parameters of PEFT's layer: they have no ending behind an adapter's name."""
    return dict.fromkeys(names, ("",))
