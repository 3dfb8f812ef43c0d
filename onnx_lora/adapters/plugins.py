"""Formats and methods by their names: our own, and those that other distributions bring by entry points. It knows none
of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import Distribution, EntryPoint, distribution, distributions
from typing import Any, Generic, TypeVar, cast

from onnx_lora.boundary import call_foreign
from onnx_lora.errors import PluginError
from onnx_lora.lazy import load_object

__all__ = ["Plugins"]

T = TypeVar("T")


class Plugins(Mapping[str, T], Generic[T]):
    """Objects of one kind by name, each loaded when it is first asked for: our own in their order, then others'.

    Other distributions declare theirs in `pyproject.toml`, in the table `[project.entry-points."GROUP"]`, as
    `NAME = "module:object"`. Which there are is looked up once a process, when a name is asked for that is not ours.
    A name of ours stays ours, whatever is installed; `refused` says who else brings it.
    """

    def __init__(self, group: str, kind: type[Any], own: Mapping[str, str], guard: str | None = None) -> None:
        """`group`: of entry points, "onnx_lora.methods". `kind`: what each object must be an instance of. `own`: ours,
        as "module:object". `guard`: a function, as "module:function", that makes of another distribution's object and
        the distribution's name an object whose failures name the distribution."""
        self._group = group
        self._kind = kind
        self._guard = guard
        self._own = {name: EntryPoint(name, reference, group) for name, reference in own.items()}
        self._loaded: dict[str, T] = {}

    @property
    def own(self) -> tuple[str, ...]:
        """The names that this package brings."""
        return tuple(self._own)

    def distribution(self, name: str) -> str | None:
        """The other distribution that brings an object, with its version; None: this package brings it."""
        return None if name in self._own else _origin(self._others[name][0])

    def __getitem__(self, name: str) -> T:
        """Raises KeyError: none of that name. PluginError: another distribution's fails to load, is of another kind, or
        has the name of a third one's."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        for name in self._others:
            if name not in self._own:
                yield name

    def __len__(self) -> int:
        return len(self._own.keys() | self._others.keys())

    @property
    def refused(self) -> tuple[str, ...]:
        """What other distributions bring and is not used, a sentence for each."""
        sentences = list(self._found[1])
        for name, entries in self._others.items():
            if name in self._own:
                brought = " and by ".join(_origin(entry) for entry in entries)
                sentences.append(
                    f"{name!r} of {self._group}, brought by {brought}, is not used: the name is onnx-lora's own; "
                    "rename or uninstall it"
                )
        return tuple(sentences)

    @property
    def _others(self) -> dict[str, list[EntryPoint]]:
        """Others' entry points by name."""
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[dict[str, list[EntryPoint]], list[str]]:
        """Others' entry points by name, and a sentence for each distribution that cannot be asked for its own."""
        entries: list[EntryPoint] = []
        unreadable: list[str] = []
        for installed in distributions():
            try:
                entries += _declared(installed, self._group)
            except PluginError as error:
                unreadable.append(error.message)
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entries, key=lambda entry: (entry.name, _origin(entry))):
            same_name = found.setdefault(entry.name, [])
            if all(_origin(entry) != _origin(other) for other in same_name):
                same_name.append(entry)
        return found, unreadable

    def _load(self, name: str) -> T:
        own = self._own.get(name)
        if own is not None:
            loaded: T = own.load()
            return loaded
        others = self._others.get(name, [])
        if not others:
            raise KeyError(name)
        if len(others) > 1:
            brought = " and by ".join(_origin(entry) for entry in others)
            raise PluginError(
                f"{name!r} of {self._group} must be brought by one distribution, and is by {brought}; uninstall all "
                "but one"
            )
        return self._load_foreign(others[0])

    def _load_foreign(self, entry: EntryPoint) -> T:
        where = f"{entry.name!r} of {self._group}, brought by {_origin(entry)},"
        value, is_of_kind = call_foreign(
            lambda: self._load_and_judge(entry),
            lambda said: PluginError(f"{where} must load, and fails with {said}; correct or uninstall it"),
        )
        if not is_of_kind:
            raise PluginError(
                f"{where} must be a {self._kind.__name__}, and {entry.value} is a {type(value).__name__}; correct or "
                "uninstall it"
            )
        loaded: T = value
        if self._guard is None:
            return loaded
        guard = cast(Callable[[T, str], T], load_object(self._guard))
        return guard(loaded, _origin(entry))

    def _load_and_judge(self, entry: EntryPoint) -> tuple[Any, bool]:
        """The object, and whether it is of the kind. To ask that calls the object's own code."""
        value = entry.load()
        return value, isinstance(value, self._kind)


def _declared(installed: Distribution, group: str) -> list[EntryPoint]:
    """A distribution's entry points of a group; none of one that another copy, earlier on the path, hides.

    Raises PluginError: its list of entry points, or its name, cannot be read.
    """

    def find() -> list[EntryPoint]:
        entries = list(installed.entry_points.select(group=group))
        if not entries:
            return []
        first = distribution(installed.name)
        is_hidden = (first.version, first.locate_file("")) != (installed.version, installed.locate_file(""))
        return [] if is_hidden else entries

    where = installed.locate_file("")
    return call_foreign(
        find,
        lambda said: PluginError(
            f"a distribution in {where} has entry points that cannot be read, and whatever it brings is not used: "
            f"{said}; install it again"
        ),
    )


def _origin(entry: EntryPoint) -> str:
    """The distribution that brings it, with its version."""
    return "an unnamed distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
