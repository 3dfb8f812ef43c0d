"""An adapter kept for as long as a generation runs, and what remains known of it afterwards. It knows OrtValues by
name; which adapter they are, it can only tell from another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import ReferenceType, ref

from onnx_lora.onnxruntime_errors import fail_in_run
from onnx_lora.runtime._ort import ort
from onnx_lora.runtime.loaded import Key, Loaded, Part, Values
from onnx_lora.strength import Strength, say_weight

__all__ = ["Identity", "Lease"]

# Per row, the adapters that were loaded and their weights.
_Parts: TypeAlias = tuple[tuple[tuple[ReferenceType[Loaded], float | Strength], ...], ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which adapters something was computed with: the loaded objects, not their names.

    They are not kept alive: an adapter unloaded frees its memory, and is then equal to no other.
    names: a row each, for messages; one for all rows where they are equal.
    """

    parts: _Parts
    names: tuple[str, ...]

    @staticmethod
    def of(key: Key) -> Identity:
        parts = [tuple((ref(loaded), weight) for loaded, weight in part) for part in key]
        names = [_describe(part) for part in key]
        return Identity(tuple(parts), tuple(names))

    def __str__(self) -> str:
        if len(self.names) == 1:
            return self.names[0]
        return f"rows of {', '.join(self.names)}"


@dataclass(frozen=True, eq=False)
class Lease:
    """The tensors of one choice of adapters, and the session that takes them."""

    session: Any
    values: Values
    identity: Identity

    @staticmethod
    def of(session: Any, key: Key, values: Values) -> Lease:
        return Lease(session, values, Identity.of(key))

    def bind(self) -> Any:
        """A new IOBinding with the adapter's inputs bound, once for all runs with it.

        Raises RunError: ONNX Runtime failed.
        """
        with fail_in_run():
            binding = ort.IOBinding(self.session)
            for name, value in self.values.items():
                binding.bind_ortvalue_input(name, value)
        return binding


def _describe(part: Part) -> str:
    """A row's adapters in words."""
    said: list[str] = []
    for loaded, weight in part:
        name = repr(loaded.part.name)
        said.append(name if weight == 1.0 else f"{name} at {say_weight(weight)}")
    return " and ".join(said) or "the base"
