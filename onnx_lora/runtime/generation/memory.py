"""What a cache must offer, and what it is given to run a graph. It says no more: `growing.py` and `shared.py` are the
two that there are, and `decoder.py` runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from onnx_lora.points import Array

__all__ = ["Memory", "Runner"]


class Runner(Protocol):
    """Runs a decoder's graph for a memory."""

    @property
    def binding(self) -> Any:
        """The IOBinding of all runs."""

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        """Logits: [rows, tokens, vocabulary]; of the last token alone where the graph gives no others."""

    def outputs(self) -> list[Any]:
        """The cache's outputs of the last run, on the device."""


class Memory(Protocol):
    """The keys and values of every token that rows were fed."""

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens in every row, where it cannot be made later. Raises RunError: no memory."""

    def connect(self, runner: Runner) -> None:
        """Bind the cache to a generation's runs, before the first."""

    def feed(self, runner: Runner, tokens: Sequence[Sequence[int]]) -> Array:
        """Put tokens behind each row, and give the logits after each row's last: [rows, vocabulary].

        Rows may get different numbers of tokens. A row that gets none stays as it is, and its logits mean nothing.
        """

    def copy(self) -> Memory:
        """The same, of its own: what is fed to one is not in the other."""
