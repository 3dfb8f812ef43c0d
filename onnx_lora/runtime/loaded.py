"""An adapter on the device of one session, and the key that stands for a choice of several. It knows tensors by name,
and nothing of how they are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from onnx_lora.points import Array
from onnx_lora.strength import Strength

if TYPE_CHECKING:
    from onnx_lora.adapters import BoundAdapter

__all__ = ["Key", "Loaded", "Part", "Values"]

# OrtValues by graph input name.
Values: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter on the device. Equal to itself alone: one loaded again under its name is another.

    bound: the adapter as it was given; `part`: what of it this session's graph takes.
    defaults: the base's own values beside it in a batch, by parameter.
    """

    bound: BoundAdapter
    part: BoundAdapter
    values: Values
    defaults: Mapping[str, Array]


# One row's adapters and their weights; none for the base.
Part: TypeAlias = tuple[tuple[Loaded, float | Strength], ...]

# One part for each row, or a single one for all rows. Holding the adapters keeps their identity from being given to
# another one while an entry lives.
Key: TypeAlias = tuple[Part, ...]
