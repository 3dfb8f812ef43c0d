"""What a PEFT config says of a module: whether it is chosen, its rank and its scale. It reads nothing.

The reference is PEFT 0.21: `check_target_module_exists`, `get_pattern_key`, `LoraLayer.update_layer`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AROUND", "AT_END", "AT_LAYER", "PeftConfig", "Ranks", "Targets", "ends_with_one"]

# How PEFT wraps the expressions of rank_pattern and alpha_pattern, modules_to_save, layers_pattern.
AT_END = r"(.*\.)?({})$"
AROUND = r"(^|.*\.){}($|\..*)"
AT_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."


@dataclass(frozen=True)
class Targets:
    """Which modules a config chooses."""

    target: str | Sequence[str] | None
    exclude: str | Sequence[str]
    saved: tuple[str, ...]  # modules_to_save
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def rejects(self, module: str) -> str | None:
        """Why PEFT would put no adapter on `module`, or None."""
        if isinstance(self.exclude, str):
            excluded = bool(self.exclude) and re.fullmatch(self.exclude, module) is not None
        else:
            excluded = ends_with_one(module, self.exclude)
        if excluded:
            return "exclude_modules excludes it"
        if any(re.match(AROUND.replace("{}", name), module) for name in self.saved):
            return "modules_to_save covers it"
        if self.target is None:
            return "target_modules is null, and PEFT then chooses by the kind of model"
        if isinstance(self.target, str):
            chosen = self.target.lower() == "all-linear" or re.fullmatch(self.target, module) is not None
        else:
            chosen = module in self.target or (ends_with_one(module, self.target) and self._layer_chosen(module))
        return None if chosen else "target_modules (with layers_to_transform) does not choose it"

    def _layer_chosen(self, module: str) -> bool:
        if not self.layers:
            return True
        patterns = [AT_LAYER.replace("{}", pattern) for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            found = re.match(pattern, module)
            if found:
                return int(found["idx"]) in self.layers
        return False


@dataclass(frozen=True)
class Ranks:
    """Rank and alpha of every module; of a method that has none, rank 1 and scale 1."""

    rank: int = 1
    alpha: float = 1.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha/r, or alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023): the only place where it is computed."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def alpha_is_ambiguous(self, module: str) -> bool:
        """Whether the order of alpha_pattern matters: PEFT sorts it on saving."""
        found = {alpha for key, alpha in self.alpha_pattern.items() if _matches_end(key, module)}
        return len(found) > 1


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


def ends_with_one(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_key(patterns: Mapping[str, object], module: str) -> str:
    """PEFT's `get_pattern_key`: anchored at the end of the module's name, first match wins."""
    return next((key for key in patterns if _matches_end(key, module)), module)


def _matches_end(pattern: str, module: str) -> bool:
    return re.match(AT_END.replace("{}", pattern), module) is not None
