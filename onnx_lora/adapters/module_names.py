"""How files spell the names of a package's modules: one ordered table of rules, each of which can be undone.

A file may write `_` for every `.`, leave out the part of a pipeline, or name a part that the package does not name. The
rules know names only. None guesses: a name that may mean several modules is a problem, and a name that no rule explains
stays as it is (`bind` then says what the package has instead)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from onnx_lora.adapters.adapter import Adapter
from onnx_lora.adapters.language_models import LAYOUTS, readings
from onnx_lora.adapters.other_versions import other_names
from onnx_lora.adapters.problems import list_first
from onnx_lora.adapters.wrappers import without_module
from onnx_lora.errors import BindError

if TYPE_CHECKING:
    from onnx_lora.package import Package

__all__ = [
    "PIPELINE_PARTS",
    "RULES",
    "FlatName",
    "KnownModules",
    "MissingPart",
    "NamingRule",
    "OtherClass",
    "OtherVersion",
    "OwnName",
    "UnknownPart",
    "Wrapped",
    "explain_names",
    "flat_name",
    "with_package_names",
]

T = TypeVar("T")

# The parts of a pipeline that adapters are for, as diffusers calls them. They stand in front of modules' names. A model
# that is no pipeline may have modules of such a name: those of GPT-2 begin with `transformer`.
PIPELINE_PARTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "prior")

# The types of models in pipelines whose modules another version calls otherwise: a pipeline has no config of them.
_KINDS_IN_PIPELINES = frozenset({"clip_text_model"})

# Candidates for one name in a message.
_MOST_CANDIDATES = 5


@dataclass(frozen=True)
class KnownModules:
    """The modules that a package names: with a point, without one, or with a replaceable weight.

    `parts`: by module, the part of a pipeline that it is of; "" where the package is no pipeline. `kinds`: the types of
    its model and of the models within, as their configs say them.
    """

    parts: Mapping[str, str]
    kinds: frozenset[str] = frozenset()

    @staticmethod
    def of(package: Package) -> KnownModules:
        parts: dict[str, str] = {}
        for graph in package.manifest.graphs:
            modules = sorted(graph.modules)
            part = _part_of(graph.name, modules)
            parts.update(dict.fromkeys(modules, part))
        kinds = frozenset(_kinds_in(package.config))
        return KnownModules(parts, kinds | _KINDS_IN_PIPELINES if any(parts.values()) else kinds)

    def with_names(self, names: Mapping[str, str]) -> KnownModules:
        """With names that stand for modules of the package, by each the module."""
        return replace(self, parts={**self.parts, **{name: self.parts[module] for name, module in names.items()}})

    def __contains__(self, module: object) -> bool:
        return module in self.parts

    @cached_property
    def part_names(self) -> list[str]:
        return sorted(set(self.parts.values()) - {""})

    @cached_property
    def by_flat_name(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for module in self.parts:
            found.setdefault(flat_name(module), []).append(module)
        return found


def _kinds_in(config: Mapping[str, Any]) -> Iterator[str]:
    """Every `model_type` that a model's config and the configs in it say."""
    kind = config.get("model_type")
    if isinstance(kind, str):
        yield kind
    for value in config.values():
        if isinstance(value, dict):
            yield from _kinds_in(value)


def _part_of(graph_name: str, modules: Sequence[str]) -> str:
    """The part of a pipeline that a graph is: its own name, which all of its modules' names begin with; or ""."""
    part = modules[0].partition(".")[0] if modules else ""
    if part not in PIPELINE_PARTS:
        return ""
    is_named_so = graph_name == part or graph_name.startswith(f"{part}_")
    is_all = all(module.startswith(f"{part}.") for module in modules)
    return part if is_named_so and is_all else ""


@dataclass(frozen=True)
class Explained:
    """What a rule says of names: `meant`, the package's name by the file's; what it cannot decide; and what a user
    should know of the names."""

    meant: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class NamingRule(Protocol):
    """One way in which a file may spell a package's names. A new way is a class here and its place in `RULES`."""

    def explain(self, names: Sequence[str], known: KnownModules, *, flat: bool) -> Explained | None:
        """What the names of one adapter mean; None where this rule says nothing of them.

        names: at least one. flat: the file says that it writes `_` for `.`.
        """

    def spellings(self, module: str, known: KnownModules) -> Sequence[str]:
        """Undoes `explain`: how files of this kind may write a module of the package."""


@dataclass(frozen=True)
class FlatName:
    """`_` stands for `.`, name by name. Behind a dot or in front of all, the file may name a part of the pipeline."""

    def explain(self, names: Sequence[str], known: KnownModules, *, flat: bool) -> Explained | None:
        if not flat:
            return None
        meant: dict[str, str] = {}
        problems: list[str] = []
        for name in names:
            found = self._candidates(name, known)
            if len(found) == 1:
                meant[name] = found[0]
            elif found:
                candidates = list_first(sorted(found), _MOST_CANDIDATES)
                problems.append(f"{name}: may mean {candidates}")
        return Explained(meant, tuple(problems))

    def _candidates(self, name: str, known: KnownModules) -> Sequence[str]:
        whole = known.by_flat_name.get(flat_name(name), [])
        part, _, rest = name.partition(".")
        if whole or not rest:
            return whole
        behind_part = known.by_flat_name.get(flat_name(rest), [])
        return [module for module in behind_part if known.parts[module] in ("", part)]

    def spellings(self, module: str, known: KnownModules) -> Sequence[str]:
        spellings = [flat_name(module)]
        part = known.parts[module]
        if part:
            within_part = module.removeprefix(f"{part}.")
            spellings.append(f"{part}.{flat_name(within_part)}")
        return spellings


@dataclass(frozen=True)
class Wrapped:
    """The file was saved from inside a wrapper, which left a part of its own in names: the others are the package's."""

    def explain(self, names: Sequence[str], known: KnownModules, *, flat: bool) -> Explained | None:
        del flat
        meant = {name: without_module(name) for name in names if name not in known}
        if not meant or any(own == name or own not in known for name, own in meant.items()):
            return None
        return Explained(meant)

    def spellings(self, module: str, known: KnownModules) -> Sequence[str]:
        del known
        spellings = [f"module.{module}"]
        first, dot, rest = module.partition(".")
        if dot:
            spellings.append(f"{first}._orig_mod.{rest}")
        return spellings


@dataclass(frozen=True)
class OtherClass:
    """The file is of a class that keeps the same language model elsewhere than the package's class does."""

    def explain(self, names: Sequence[str], known: KnownModules, *, flat: bool) -> Explained | None:
        del flat
        if all(name in known for name in names):
            return None
        found = readings(names, known.__contains__)
        if not found:
            return None
        if len(found) > 1:
            meanings = " or ".join(reading.names[names[0]] for reading in found)
            return Explained(
                problems=(f"{names[0]} (and {len(names) - 1} more): may mean {meanings}; rename its tensors",)
            )
        [reading] = found
        note = (
            f"the adapter was trained on another class of this model: its modules {reading.own}… are this package's "
            f"{reading.other}…"
        )
        return Explained(reading.names, notes=(note,))

    def spellings(self, module: str, known: KnownModules) -> Sequence[str]:
        del known
        spellings: list[str] = []
        for own in LAYOUTS:
            part = own.part_of(module)
            if part is not None:
                spellings.extend(other.name_of(part) for other in LAYOUTS)
        return [name for name in dict.fromkeys(spellings) if name != module]


@dataclass(frozen=True)
class OtherVersion:
    """The file was saved under another version of transformers than the package was made with."""

    def explain(self, names: Sequence[str], known: KnownModules, *, flat: bool) -> Explained | None:
        del flat
        meant: dict[str, str] = {}
        for name in names:
            if name in known:
                continue
            found = [other for other in other_names(name, known.kinds) if other in known]
            if not found:
                return None
            if len(found) > 1:
                return Explained(problems=(f"{name}: may mean {' or '.join(found)}; rename its tensors",))
            [meant[name]] = found
        if not meant:
            return None
        own, other = next(iter(meant.items()))
        note = (
            "the adapter was saved under another version of transformers than the package was made with: its modules "
            f"are called otherwise, {own} is this package's {other}"
        )
        return Explained(meant, notes=(note,))

    def spellings(self, module: str, known: KnownModules) -> Sequence[str]:
        return other_names(module, known.kinds)


@dataclass(frozen=True)
class OwnName:
    """A file with one name of the package's own has all its names from there."""

    def explain(self, names: Sequence[str], known: KnownModules, *, flat: bool) -> Explained | None:
        del flat
        return Explained() if any(name in known for name in names) else None

    def spellings(self, module: str, known: KnownModules) -> Sequence[str]:
        del known
        return [module]


@dataclass(frozen=True)
class MissingPart:
    """The file is of one part of the pipeline and does not say which: the only one that has all of its modules."""

    def explain(self, names: Sequence[str], known: KnownModules, *, flat: bool) -> Explained | None:
        del flat
        fitting = [part for part in known.part_names if self._has_all(part, names, known)]
        if not fitting:
            return None
        if len(fitting) > 1:
            candidates = list_first(sorted(fitting), _MOST_CANDIDATES)
            problem = f"{names[0]} (and {len(names) - 1} more): may be of {candidates}; put that in front"
            return Explained(problems=(problem,))
        [part] = fitting
        return Explained({name: f"{part}.{name}" for name in names})

    def _has_all(self, part: str, names: Sequence[str], known: KnownModules) -> bool:
        return all(f"{part}.{name}" in known for name in names)

    def spellings(self, module: str, known: KnownModules) -> Sequence[str]:
        part = known.parts[module]
        return [module.removeprefix(f"{part}.")] if part else []


@dataclass(frozen=True)
class UnknownPart:
    """The file names the part of a pipeline, one for all modules, and the package is of that model alone."""

    def explain(self, names: Sequence[str], known: KnownModules, *, flat: bool) -> Explained | None:
        del flat
        part = names[0].partition(".")[0]
        if known.part_names or part not in PIPELINE_PARTS:
            return None
        meant: dict[str, str] = {}
        for name in names:
            own = name.removeprefix(f"{part}.")
            if own == name or own not in known:
                return None
            meant[name] = own
        return Explained(meant)

    def spellings(self, module: str, known: KnownModules) -> Sequence[str]:
        return [] if known.part_names else [f"{part}.{module}" for part in PIPELINE_PARTS]


# The first rule that says something of an adapter's names counts for all of them.
RULES: tuple[NamingRule, ...] = (
    FlatName(),
    Wrapped(),
    OtherClass(),
    OtherVersion(),
    OwnName(),
    MissingPart(),
    UnknownPart(),
)


def explain_names(names: Sequence[str], known: KnownModules, *, flat: bool = False) -> Explained:
    """What the names of one adapter's modules mean in a package. A name that is not in `meant` stays as it is."""
    if not names:
        return Explained()
    for rule in RULES:
        explained = rule.explain(names, known, flat=flat)
        if explained is not None:
            return explained
    return Explained()


def flat_name(module: str) -> str:
    """The module's name as kohya's files write it."""
    return module.replace(".", "_")


def with_package_names(adapter: Adapter, package: Package, also: Mapping[str, str] | None = None) -> Adapter:
    """The adapter with the package's own names of modules. `also`: names that are as good, by each the module of the
    package that it stands for.

    Raises BindError: names that may mean several modules, or several names that mean one.
    """
    names = _module_names(adapter)
    known = KnownModules.of(package).with_names(also or {})
    explained = explain_names(names, known, flat=adapter.flat_names)
    by_meaning: dict[str, list[str]] = {}
    for name in names:
        by_meaning.setdefault(explained.meant.get(name, name), []).append(name)
    problems = list(explained.problems)
    for module, own in by_meaning.items():
        if len(own) > 1:
            problems.append(f"{module}: {' and '.join(own)} both mean it")
    if problems:
        raise BindError(
            f"the names of adapter {adapter.name!r} must mean one module each of the package {package.path}",
            path=adapter.origin.path,
            problems=problems,
        )
    if explained.meant:
        adapter = _renamed(adapter, explained.meant)
    return replace(adapter, notes=(*adapter.notes, *explained.notes)) if explained.notes else adapter


def _module_names(adapter: Adapter) -> list[str]:
    """The modules that an adapter changes, each once; of a whole weight the module whose parameter it is."""
    of_parameters = (name.rpartition(".")[0] for name in adapter.replacements)
    return list(dict.fromkeys([*adapter.deltas, *adapter.changes, *of_parameters]))


def _renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The adapter with new names of modules, wherever it has any."""

    def module(name: str) -> str:
        return names.get(name, name)

    def parameter(name: str) -> str:
        own, dot, rest = name.rpartition(".")
        return f"{module(own)}{dot}{rest}"

    def module_or_parameter(name: str) -> str:
        return names[name] if name in names else parameter(name)

    return replace(
        adapter,
        deltas=_with_keys(adapter.deltas, module),
        changes=_with_keys(adapter.changes, module),
        replacements=_with_keys(adapter.replacements, parameter),
        base_digests=_with_keys(adapter.base_digests, module_or_parameter),
        saved_modules=tuple(module(name) for name in adapter.saved_modules),
        task_heads=tuple(module(name) for name in adapter.task_heads),
        made_of=_with_keys(adapter.made_of, module),
        with_tied_heads=frozenset(module(name) for name in adapter.with_tied_heads),
        flat_names=False,
    )


def _with_keys(values: Mapping[str, T], new: Callable[[str], str]) -> dict[str, T]:
    return {new(key): value for key, value in values.items()}
