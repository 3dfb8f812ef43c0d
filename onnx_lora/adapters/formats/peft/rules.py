"""What a PEFT config says of a module: whether it is chosen, its rank and its scale. It reads nothing.

The reference is PEFT 0.21: `check_target_module_exists`, `get_pattern_key`, `LoraLayer.update_layer`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

from onnx_lora.adapters.formats.peft.patterns import Endings, Patterns, tails
from onnx_lora.expressions import Expression, ExpressionError, Work

__all__ = ["Choice", "Everything", "Layers", "Named", "PeftConfig", "Ranks", "Table", "Targets", "Whole"]

T = TypeVar("T")

# The number of a module's layer, where the config names no layers_pattern.
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


class Choice(Protocol):
    """Some modules of all."""

    def takes(self, module: str) -> bool:
        """Raises ExpressionError: too much work."""


@dataclass(frozen=True)
class Everything:
    """`all-linear`: whichever module has tensors was one of them."""

    def takes(self, module: str) -> bool:
        del module
        return True


@dataclass(frozen=True)
class Named:
    """Modules by their names, or by what stands behind one of the dots."""

    names: frozenset[str]

    def takes(self, module: str) -> bool:
        return any(tail in self.names for tail in tails(module))


@dataclass(frozen=True)
class Whole:
    """Modules whose whole name an expression matches."""

    expression: Expression

    def takes(self, module: str) -> bool:
        return self.expression.fullmatch(module)


@dataclass(frozen=True)
class Layers:
    """`layers_to_transform`, and what the lists of layers are called by `layers_pattern`; empty: by any name."""

    numbers: frozenset[int]
    patterns: tuple[Expression, ...] = ()

    @classmethod
    def of(cls, numbers: Iterable[int], patterns: Sequence[str], work: Work) -> Layers:
        """Raises ExpressionError: no expression."""
        return cls(frozenset(numbers), tuple(Expression(rf"{pattern}\.(?=\d+\.)", work) for pattern in patterns))

    def takes(self, module: str) -> bool:
        if not self.patterns:
            found = _ANY_LAYER.match(module)
            return found is not None and int(found["idx"]) in self.numbers
        numbers = (_number(pattern, module) for pattern in self.patterns)
        return next((number for number in numbers if number is not None), None) in self.numbers


def _number(pattern: Expression, module: str) -> int | None:
    """The layer's, behind the first list of layers. Raises ExpressionError: it is not told, and too much work."""
    for tail in tails(module):
        ends = pattern.ends(module, len(module) - len(tail))
        found = {module[end:].partition(".")[0] for end in ends}
        if len(found) > 1 or not all(number.isdecimal() for number in found):
            raise ExpressionError(f"layers_pattern does not tell which number of {module} is the layer's; write names")
        if found:
            return int(found.pop())
    return None


@dataclass(frozen=True)
class Targets:
    """Which modules a config chooses. `chosen`: target_modules, None where it is null; `named`: those that it names
    whole, whatever their layer is; `saved`: modules_to_save."""

    chosen: Choice | None
    excluded: Choice
    saved: Patterns
    saved_names: tuple[str, ...] = ()
    named: frozenset[str] = frozenset()
    layers: Layers | None = None

    def rejects(self, module: str) -> str | None:
        """Why PEFT would put no adapter on `module`, or None. Raises ExpressionError: too much work."""
        if self.excluded.takes(module):
            return "exclude_modules excludes it"
        if self.saved.first(module) is not None:
            return "modules_to_save covers it"
        if self.chosen is None:
            return "target_modules is null, and PEFT then chooses by the kind of model"
        in_layers = self.layers is None or module in self.named or self.layers.takes(module)
        if self.chosen.takes(module) and in_layers:
            return None
        return "target_modules (with layers_to_transform) does not choose it"


class Table(Generic[T]):
    """`rank_pattern` or `alpha_pattern`: numbers by expression, anchored at the end of a module's name."""

    def __init__(self, values: Mapping[str, T], work: Work | None = None) -> None:
        """Raises ExpressionError: no expression, or too many."""
        self._values, self._in_order = values, tuple(values.values())
        self._patterns = Patterns(tuple(values), "at end", work)

    def of(self, module: str, default: T) -> T:
        """The first match counts; as in PEFT, a name that is no match as an expression counts as it stands.

        Raises ExpressionError: too much work.
        """
        first = self._patterns.first(module)
        return self._values.get(module, default) if first is None else self._in_order[first]

    def all(self, module: str) -> set[T]:
        """Raises ExpressionError: too much work."""
        return {self._in_order[number] for number in self._patterns.all(module)}


@dataclass(frozen=True)
class Ranks:
    """Rank and alpha of every module; of a method that has none, rank 1 and scale 1."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Table[int]
    alpha_pattern: Table[float]

    def rank_of(self, module: str) -> int:
        """Raises ExpressionError: too much work."""
        return self.rank_pattern.of(module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha/r, or alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023): the only place where it is computed.

        Raises ExpressionError: too much work.
        """
        rank, alpha = self.rank_of(module), self.alpha_pattern.of(module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def alpha_is_ambiguous(self, module: str) -> bool:
        """Whether the order of alpha_pattern matters: PEFT sorts it on saving. Raises ExpressionError."""
        return len(self.alpha_pattern.all(module)) > 1


@dataclass(frozen=True)
class PeftConfig:
    """A config that was checked. `fields`: as the file has them, for what only one method reads."""

    peft_type: str
    method: str  # by the name that people use: "rsLoRA"
    base_model: str
    bias: str
    task_heads: tuple[str, ...]
    targets: Targets
    ranks: Ranks
    fields: Mapping[str, Any]
    _made: dict[Callable[[Mapping[str, Any]], Any], Any] = field(default_factory=dict)

    def once(self, make: Callable[[Mapping[str, Any]], T]) -> T:
        """What a method makes of the fields, made once for all modules."""
        if make not in self._made:
            self._made[make] = make(self.fields)
        made: T = self._made[make]
        return made

    @cached_property
    def whole(self) -> Endings:
        """What PEFT saves whole: modules_to_save, and the heads of the task."""
        return Endings((*self.targets.saved_names, *self.task_heads))
