"""Which of a package's modules an adapter's names mean, where they leave that open: flat names, parts of a pipeline,
and the number of heads that rows are ordered by. It knows names only, and guesses none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from onnx_lora.adapters.adapter import Adapter
from onnx_lora.adapters.formats.diffusion.diffusers_names import COMPONENTS
from onnx_lora.adapters.formats.gguf.rows import InterleavedRows
from onnx_lora.adapters.model_config import config_of
from onnx_lora.errors import BindError
from onnx_lora.package import Package

__all__ = ["modules_of", "resolved"]

T = TypeVar("T")

# Candidates that a message names.
_SHOWN = 5


def resolved(adapter: Adapter, package: Package) -> Adapter:
    """The adapter with the package's own names. What the package has none for keeps its name: `bind` explains it.

    A flat name is looked up among all modules with `_` for `.`; a name without a part of the pipeline (`unet.`) gets
    one only if exactly one part has all modules; a part that the package does not name is taken off.

    Raises BindError: names that may mean several modules, or several that mean one.
    """
    known = _Known(package)
    modules = _modules(adapter)
    names, problems = known.flat(modules) if adapter.flat_names else known.dotted(modules)
    meant: dict[str, list[str]] = {}
    for name in modules:
        meant.setdefault(names.get(name, name), []).append(name)
    problems += [f"{module}: {' and '.join(own)} both mean it" for module, own in meant.items() if len(own) > 1]
    if problems:
        raise BindError(
            f"the names of adapter {adapter.name!r} must mean one module each of the package {package.path}",
            path=adapter.origin.path,
            problems=problems,
        )
    return _with_heads(_renamed(adapter, names), package)


def modules_of(package: Package) -> list[str]:
    """Every module that a package names, with a point, without one, or with a replaceable weight."""
    return list(_Known(package).modules)


def _modules(adapter: Adapter) -> list[str]:
    own = [*adapter.deltas, *adapter.changes, *(name.rpartition(".")[0] for name in adapter.replacements)]
    return list(dict.fromkeys(own))


def _renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    if not names:
        return adapter

    def parameter(name: str) -> str:
        module, dot, own = name.rpartition(".")
        return f"{names.get(module, module)}{dot}{own}"

    return replace(
        adapter,
        deltas=_keys(adapter.deltas, lambda name: names.get(name, name)),
        changes=_keys(adapter.changes, lambda name: names.get(name, name)),
        replacements=_keys(adapter.replacements, parameter),
        base_digests=_keys(adapter.base_digests, lambda name: names[name] if name in names else parameter(name)),
        saved_modules=tuple(names.get(name, name) for name in adapter.saved_modules),
        made_of=_keys(adapter.made_of, lambda name: names.get(name, name)),
        with_tied_heads=frozenset(names.get(name, name) for name in adapter.with_tied_heads),
        flat_names=False,
    )


def _keys(values: Mapping[str, T], new: Callable[[str], str]) -> dict[str, T]:
    return {new(name): value for name, value in values.items()}


@dataclass(frozen=True)
class _Known:
    """The modules that a package names."""

    package: Package

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """By name, the part of the pipeline that each is of, or nothing."""
        found: dict[str, str] = {}
        for graph in self.package.manifest.graphs:
            own = {point.module for point in graph.points} | set(graph.untargeted)
            own |= {weight.module for weight in graph.replaceable}
            first = next(iter(own), "").partition(".")[0]
            is_part = (graph.name == first or graph.name.startswith(f"{first}_")) and first in COMPONENTS
            part = first if is_part and all(name.startswith(f"{first}.") for name in own) else ""
            found.update(dict.fromkeys(sorted(own), part))
        return found

    @cached_property
    def parts(self) -> list[str]:
        return sorted({part for part in self.modules.values() if part})

    @cached_property
    def _by_flat_name(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for module in self.modules:
            found.setdefault(_flat(module), []).append(module)
        return found

    def flat(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """New names, and what is ambiguous. A name begins with its part of the pipeline, where the format tells it."""
        meant: dict[str, str] = {}
        problems = []
        for name in names:
            part, _, rest = name.partition(".")
            found = self._by_flat_name.get(_flat(name), [])
            if not found and rest:
                found = [own for own in self._by_flat_name.get(_flat(rest), []) if self.modules[own] in ("", part)]
            if len(found) > 1:
                problems.append(f"{name}: may mean {_list(found)}")
            elif found:
                meant[name] = found[0]
        return meant, problems

    def dotted(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """New names, and what is ambiguous."""
        names = list(names)
        if not names or any(name in self.modules for name in names):
            return {}, []
        if self.parts:
            fitting = [part for part in self.parts if all(f"{part}.{name}" in self.modules for name in names)]
            if len(fitting) > 1:
                return {}, [f"{names[0]} (and {len(names) - 1} more): may be of {_list(fitting)}; put that in front"]
            return {name: f"{part}.{name}" for part in fitting for name in names}, []
        part = names[0].partition(".")[0]
        bare = {name: name.removeprefix(f"{part}.") for name in names}
        alone = part in COMPONENTS and all(bare[name] != name and bare[name] in self.modules for name in names)
        return bare if alone else {}, []


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _list(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _with_heads(adapter: Adapter, package: Package) -> Adapter:
    """Rows that llama.cpp ordered by heads, in PyTorch's order; those whose heads nobody knows stay changes."""
    rows = {name: change for name, change in adapter.changes.items() if isinstance(change, InterleavedRows)}
    if not rows:
        return adapter
    config = config_of(package)
    made = {name: change.with_heads(_heads(config, change.heads)) for name, change in rows.items()}
    known = {name: delta for name, delta in made.items() if delta is not None}
    changes = {name: change for name, change in adapter.changes.items() if name not in known}
    return replace(adapter, deltas={**adapter.deltas, **known}, changes=changes)


def _heads(config: Mapping[str, Any], key: str) -> int:
    """Keys and values have as many heads as queries where the config does not say."""
    count = config.get(key, config.get("num_attention_heads"))
    return count if type(count) is int else 0
