"""An adapter held for as long as a generation runs, and what remains known of it afterwards. It knows OrtValues by
name; which adapter they are, it can only tell from another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import ReferenceType, ref

from onnx_lora.runtime._ort import ort, running
from onnx_lora.runtime.store import Key, Loaded, Values

__all__ = ["Held", "Identity"]

# Per row, the adapters that were loaded and their weights.
_Parts: TypeAlias = tuple[tuple[tuple[ReferenceType[Loaded], float], ...], ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which adapters something was computed with: the loaded objects, not their names.

    They are not kept alive: an adapter unloaded frees its memory, and is then equal to no other.
    """

    parts: _Parts
    names: tuple[str, ...]  # a row each, for messages; one for all rows where they are equal

    @staticmethod
    def of(key: Key) -> Identity:
        parts = tuple(tuple((ref(loaded), weight) for loaded, weight in choice) for choice in key)
        return Identity(parts, tuple(_name(choice) for choice in key))

    def __str__(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"rows of {', '.join(self.names)}"


@dataclass(frozen=True, eq=False)
class Held:
    """The tensors of one choice of adapters, and the session that takes them."""

    session: Any
    values: Values
    identity: Identity

    @staticmethod
    def of(session: Any, key: Key, values: Values) -> Held:
        return Held(session, values, Identity.of(key))

    def binding(self) -> Any:
        """A new IOBinding with the adapter's inputs bound, once for all runs with it."""
        with running():
            binding = ort.IOBinding(self.session)
            for name, value in self.values.items():
                binding.bind_ortvalue_input(name, value)
        return binding


def _name(choice: tuple[tuple[Loaded, float], ...]) -> str:
    parts = [repr(loaded.part.name) + (f" at {weight:g}" if weight != 1.0 else "") for loaded, weight in choice]
    return " and ".join(parts) or "the base"
