"""Endings of the names of modules, and lookups of many of them at once. It knows no config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["Endings", "tails"]


def tails(module: str) -> Iterator[str]:
    """A module's name, and what stands behind each of its dots."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


class Endings:
    """Names in an order, each looked for at the end of others, wherever it begins there: `q` is an end of `m.seq`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}
        for number, name in enumerate(names):
            self._numbers.setdefault(name, number)
        self._lengths = sorted({len(name) for name in self._numbers})

    def first(self, module: str) -> int | None:
        """The number of the first name that `module` ends with, or None."""
        found: list[int] = []
        for length in self._lengths:
            if length > len(module):
                break
            ending = module[len(module) - length :]
            if ending in self._numbers:
                found.append(self._numbers[ending])
        return min(found, default=None)

    def covers(self, module: str) -> bool:
        """Whether `module`, or a module around it, ends with a name. As `points.matches`, and faster for many names."""
        outer, dot = module, "."
        while dot:
            if self.first(outer) is not None:
                return True
            outer, dot, _ = outer.rpartition(".")
        return False
