"""Names that the names of modules end with. It knows no config."""

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
            if length <= len(module):
                number = self._numbers.get(module[len(module) - length :])
                if number is not None:
                    found.append(number)
        return min(found, default=None)

    def take(self, module: str) -> bool:
        """Whether `module`, or a module around it, ends with a name: as `points.matches`, of many names."""
        parts = module.split(".")
        return any(self.first(".".join(parts[:end])) is not None for end in range(1, len(parts) + 1))
