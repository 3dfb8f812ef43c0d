"""What a PEFT config says of a module: whether it is chosen, its rank and its scale. It reads nothing.

The reference is PEFT 0.21: `check_target_module_exists`, `get_pattern_key`, `LoraLayer.update_layer`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from onnx_lora.adapters.formats.peft.patterns import Patterns
from onnx_lora.adapters.methods.endings import Endings, tails
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.expressions import Expression, ExpressionError, Work

if TYPE_CHECKING:
    from onnx_lora.adapters.methods.method import Fields, Method

__all__ = ["Choice", "Everything", "Layers", "Matching", "Named", "PatternTable", "PeftConfig", "Ranks", "Targets"]

T = TypeVar("T")

# The number of a module's layer, where the config names no layers_pattern.
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


class Choice(Protocol):
    """A choice of modules."""

    def takes(self, module: str) -> bool:
        """Whether `module` is one of them. Raises ExpressionError: too much work."""


@dataclass(frozen=True)
class Everything:
    """`all-linear`: every module. A module that has tensors in the file was linear."""

    def takes(self, module: str) -> bool:
        """True."""
        del module
        return True


@dataclass(frozen=True)
class Named:
    """Modules by their names, or by what stands behind one of the dots."""

    names: frozenset[str]

    def takes(self, module: str) -> bool:
        """Whether `module` ends with one of the names, whole or behind a dot."""
        return any(tail in self.names for tail in tails(module))


@dataclass(frozen=True)
class Matching:
    """Modules whose whole name an expression matches."""

    expression: Expression

    def takes(self, module: str) -> bool:
        """Whether the expression matches all of the name. Raises ExpressionError: too much work."""
        return self.expression.fullmatch(module)


@dataclass(frozen=True)
class Layers:
    """The modules in some layers. `numbers`: `layers_to_transform`. `patterns`: `layers_pattern`, the names that lists
    of layers may have, `layers_pattern`; empty: any name."""

    numbers: frozenset[int]
    patterns: tuple[Expression, ...] = ()

    @classmethod
    def of(cls, numbers: Iterable[int], patterns: Sequence[str], work: Work) -> Layers:
        """The rule of these two fields. Raises ExpressionError: a pattern is no expression."""
        expressions = [Expression(rf"{pattern}\.(?=\d+\.)", work) for pattern in patterns]
        return cls(frozenset(numbers), tuple(expressions))

    def takes(self, module: str) -> bool:
        """Whether `module` lies in one of the layers. Raises ExpressionError: the pattern leaves open which number of
        its name is the layer's, or it is too much work."""
        if not self.patterns:
            found = _ANY_LAYER.match(module)
            return found is not None and int(found["idx"]) in self.numbers
        for pattern in self.patterns:
            number = _layer_number(pattern, module)
            if number is not None:
                return number in self.numbers
        return False


def _layer_number(pattern: Expression, module: str) -> int | None:
    """The layer's number, behind the first list of layers that the pattern finds. Raises ExpressionError."""
    for tail in tails(module):
        ends = pattern.ends(module, len(module) - len(tail))
        found = {module[end:].partition(".")[0] for end in ends}
        if len(found) > 1 or not all(number.isdecimal() for number in found):
            raise ExpressionError(
                f"layers_pattern does not tell which number of {module} is the layer's; write names in its place"
            )
        if found:
            return int(found.pop())
    return None


@dataclass(frozen=True)
class Targets:
    """Which modules a config chooses.

    `chosen`: target_modules, None where it is null. `named`: those that it names whole, which count in every layer.
    `saved` and `saved_names`: modules_to_save, as patterns and as they stand.
    """

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


class PatternTable(Generic[T]):
    """`rank_pattern` or `alpha_pattern`: numbers by expression, anchored at the end of a module's name."""

    def __init__(self, values: Mapping[str, T], work: Work | None = None) -> None:
        """Raises ExpressionError: a key is no expression, or there are too many."""
        self._values = values
        self._in_order = tuple(values.values())
        self._patterns = Patterns(tuple(values), "at end", work)

    def of(self, module: str, default: T) -> T:
        """The first match counts; as in PEFT, a name that is no match as an expression counts as it stands.

        Raises ExpressionError: too much work.
        """
        first = self._patterns.first(module)
        return self._values.get(module, default) if first is None else self._in_order[first]

    def all(self, module: str) -> set[T]:
        """The numbers of all matches. Raises ExpressionError: too much work."""
        return {self._in_order[number] for number in self._patterns.all(module)}


@dataclass(frozen=True)
class Ranks:
    """Rank and alpha of every module; of a method that has none, rank 1 and alpha 1."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]

    def rank_of(self, module: str) -> int:
        """The config's rank for a module, or for a bare parameter. Raises ExpressionError: too much work."""
        return self.rank_pattern.of(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The config's alpha. Raises ExpressionError: too much work."""
        return self.alpha_pattern.of(module, self.alpha)

    def scale_of(self, module: str) -> float:
        """LoRA's scale, which some methods have no use for. Raises ExpressionError: too much work."""
        return lora_scale(self.alpha_of(module), self.rank_of(module), rslora=self.rslora)

    def alpha_is_ambiguous(self, module: str) -> bool:
        """Whether the order of alpha_pattern matters: PEFT sorts it on saving. Raises ExpressionError."""
        return len(self.alpha_pattern.all(module)) > 1


@dataclass(frozen=True)
class PeftConfig:
    """A config that was checked. `method_name`: what people call the method, "rsLoRA". `fields`: the fields as the file
    has them, for the methods, which read those of their own."""

    method: Method
    method_name: str
    base_model: str
    bias: str
    task_heads: tuple[str, ...]
    targets: Targets
    ranks: Ranks
    fields: Fields

    @cached_property
    def saved_whole(self) -> Endings:
        """The modules that PEFT saves whole: modules_to_save, and the heads of the task."""
        return Endings((*self.targets.saved_names, *self.task_heads))
