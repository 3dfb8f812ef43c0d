"""PEFT's `adapter_config.json`: its fields, checked, as rules. It knows no tensor.

The references are `LoraConfig` of PEFT 0.21, and the configs of its other methods, where their fields mean the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from onnx_lora.adapters.formats.peft.patterns import Patterns
from onnx_lora.adapters.formats.peft.refused import check_method, refusals
from onnx_lora.adapters.formats.peft.rules import (
    Choice,
    Everything,
    Layers,
    Matching,
    Named,
    PatternTable,
    PeftConfig,
    Ranks,
    Targets,
)
from onnx_lora.adapters.methods.method import Fields, Method
from onnx_lora.adapters.methods.registry import METHODS
from onnx_lora.adapters.problems import abbreviate
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.expressions import Expression, ExpressionError, Work
from onnx_lora.heads import TASK_HEADS
from onnx_lora.json_file import read_json

__all__ = ["CONFIG", "parse_config", "read_config"]

T = TypeVar("T")

CONFIG = "adapter_config.json"


def read_config(path: Path, *, with_initial: bool = False) -> PeftConfig:
    """Read and check `adapter_config.json`. `with_initial`: the adapter's initial state is there too.

    Raises AdapterFileError: damaged, or not PEFT's. UnsupportedAdapterError: PEFT's, and refused,
    every reason named.
    """
    return parse_config(read_json(path, AdapterFileError), path, with_initial=with_initial)


def parse_config(config: dict[str, Any], path: Path, *, with_initial: bool = False) -> PeftConfig:
    """As `read_config`, of a config's fields."""
    method = check_method(config, METHODS, path)
    problems = refusals(config, method, with_initial=with_initial)
    if problems:
        raise UnsupportedAdapterError("says what cannot be applied exactly", path=path, problems=problems)
    reader = _Reader(config)
    rules = reader.config_of(method)
    if reader.problems:
        raise AdapterFileError("is no config that PEFT would load", path=path, problems=reader.problems)
    return rules


class _Reader:
    """Takes fields out of a config and collects what is wrong with them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.work = Work()
        self.problems: list[str] = []

    def config_of(self, method: Method) -> PeftConfig:
        task = self.config.get("task_type")
        return PeftConfig(
            method=method,
            method_name=self.name_of(method),
            base_model=self.base_model(),
            bias=self.bias(),
            task_heads=TASK_HEADS.get(task, ()) if isinstance(task, str) else (),
            targets=self.targets(),
            ranks=self.ranks(method),
            fields=Fields(self.config),
        )

    def name_of(self, method: Method) -> str:
        for field, variant in method.variants.items():
            if self.config.get(field):
                return variant
        return method.name

    def targets(self) -> Targets:
        chosen: Choice | None = None
        named: frozenset[str] = frozenset()
        target: str | tuple[str, ...] | None = None
        if self.config.get("target_modules") is not None:
            target = self.names("target_modules")
            chosen = self.choice("target_modules", target)
            named = frozenset(target) if isinstance(target, tuple) else named
        layers = self.layers()
        saved = self.name_list("modules_to_save")
        if isinstance(target, str) and self.config.get("layers_to_transform") is not None:
            self.problems.append("layers_to_transform cannot go with a target_modules that is one string")
        if self.config.get("layers_pattern") and layers is None:
            self.problems.append("layers_pattern needs layers_to_transform")
        return Targets(
            chosen=chosen,
            excluded=self.choice("exclude_modules", self.names("exclude_modules") or ()),
            saved=self.compile("modules_to_save", lambda: Patterns(saved, "around", self.work), Patterns((), "around")),
            saved_names=saved,
            named=named,
            layers=self.layers_rule(layers or ()),
        )

    def choice(self, key: str, names: str | tuple[str, ...]) -> Choice:
        """One regular expression, or names."""
        if not isinstance(names, str):
            return Named(frozenset(names))
        if key == "target_modules" and names.lower() == "all-linear":
            return Everything()
        everything: Choice = Everything()
        return self.compile(key, lambda: Matching(Expression(names, self.work)), everything)

    def layers_rule(self, numbers: tuple[int, ...]) -> Layers | None:
        """The rule of layers_to_transform and layers_pattern; None: every layer counts."""
        patterns = self.name_list("layers_pattern", one=True)
        rule = self.compile("layers_pattern", lambda: Layers.of(numbers, patterns, self.work), Layers(frozenset()))
        return rule if numbers else None

    def ranks(self, method: Method) -> Ranks:
        ranks: dict[str, int] = {}
        for key, value in self.table("rank_pattern", method):
            ranks[key] = self.rank(f"rank_pattern[{key!r}]", value)
        alphas: dict[str, float] = {}
        for key, value in self.table("alpha_pattern", method):
            alphas[key] = self.number(f"alpha_pattern[{key!r}]", value)
        rank = 1
        if method.rank is not None:
            rank = self.rank(method.rank, self.config.get(method.rank))
        alpha = 1.0
        if method.alpha is not None:
            alpha = self.number(method.alpha, self.config.get(method.alpha))
        return Ranks(
            rank=rank,
            alpha=alpha,
            rslora=bool(self.config.get("use_rslora")),
            rank_pattern=self.compile("rank_pattern", lambda: PatternTable(ranks, self.work), PatternTable({})),
            alpha_pattern=self.compile("alpha_pattern", lambda: PatternTable(alphas, self.work), PatternTable({})),
        )

    def compile(self, key: str, make: Callable[[], T], otherwise: T) -> T:
        """The rule that `make` makes of the expressions of the field `key`. Where one of them is no expression, a
        problem says so and the rule is `otherwise`."""
        try:
            return make()
        except ExpressionError as error:
            self.problems.append(f"{key}: {error}")
            return otherwise

    def rank(self, key: str, value: object) -> int:
        if type(value) is int and value > 0:
            return value
        self.problems.append(f"{key} must be a rank of at least 1, and is {abbreviate(value)}")
        return 1

    def number(self, key: str, value: object) -> float:
        # A missing alpha gets no default: PEFT had none once, and has 8 now.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        self.problems.append(f"{key} must be a finite number, and is {abbreviate(value)}")
        return 0.0

    def bias(self) -> str:
        value = self.config.get("bias") or "none"
        # Each method has its own word for the biases of its modules: lora_only, MiSS_only.
        is_known = isinstance(value, str) and (value in ("none", "all") or value.endswith("_only"))
        if not is_known:
            self.problems.append(f"bias must be none, all or lora_only, and is {abbreviate(value)}")
            return "none"
        return str(value)

    def base_model(self) -> str:
        value = self.config.get("base_model_name_or_path") or ""
        if isinstance(value, str):
            return value
        self.problems.append(f"base_model_name_or_path must be a name, and is {abbreviate(value)}")
        return ""

    def table(self, key: str, method: Method) -> list[tuple[str, object]]:
        """The entries of a field that maps modules to numbers, of a method that has such fields."""
        value: object = {}
        if method.patterns:
            value = self.config.get(key) or {}
        if not isinstance(value, dict):
            self.problems.append(f"{key} must map module names to numbers, and is {abbreviate(value)}")
            return []
        return list(value.items())

    def names(self, key: str) -> str | tuple[str, ...]:
        """A regular expression, or a list of names."""
        value = self.config.get(key)
        if isinstance(value, str):
            return value
        if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return tuple(value or ())
        self.problems.append(f"{key} must be a list of module names or one string, and is {abbreviate(value)}")
        return ()

    def name_list(self, key: str, *, one: bool = False) -> tuple[str, ...]:
        """A list of regular expressions; with `one` a single string is a list of one."""
        value = self.names(key)
        if not isinstance(value, str):
            return value
        if not one:
            self.problems.append(f"{key} must be a list of module names, and is {abbreviate(value)}")
            return ()
        return (value,) if value else ()

    def layers(self) -> tuple[int, ...] | None:
        value = self.config.get("layers_to_transform")
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if all(type(layer) is int for layer in layers):
            return tuple(layers)
        self.problems.append(f"layers_to_transform must be layer numbers, and is {abbreviate(value)}")
        return None
