"""What a call must feed, and may ask for: the model's own inputs and outputs. It knows shapes and types,
no adapter's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lora.errors import FeedError, SelectionError

__all__ = ["TYPES", "Signature"]

# ONNX Runtime's names of the types that numpy has too, and their numbers in ONNX (TensorProto.DataType).
TYPES = {
    "tensor(float)": ("float32", 1),
    "tensor(uint8)": ("uint8", 2),
    "tensor(int8)": ("int8", 3),
    "tensor(uint16)": ("uint16", 4),
    "tensor(int16)": ("int16", 5),
    "tensor(int32)": ("int32", 6),
    "tensor(int64)": ("int64", 7),
    "tensor(bool)": ("bool", 9),
    "tensor(float16)": ("float16", 10),
    "tensor(double)": ("float64", 11),
    "tensor(uint32)": ("uint32", 12),
    "tensor(uint64)": ("uint64", 13),
}


@dataclass(frozen=True, slots=True)
class _Slot:
    """One input or output. `dtype` is empty where numpy has no such type; `shape` where any rank goes.

    `element`: the type's number in ONNX, 0 where numpy has none.
    """

    name: str
    type: str
    dtype: str
    element: int
    shape: tuple[int | str | None, ...]
    required: bool = True

    @staticmethod
    def of(arg: Any, *, required: bool = True) -> _Slot:
        optional = arg.type.startswith("optional")
        dtype, element = TYPES.get(arg.type, ("", 0))
        return _Slot(arg.name, arg.type, dtype, element, tuple(arg.shape or ()), required and not optional)

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype or self.type} [{dims}]"

    @property
    def batched(self) -> bool:
        """Whether its first axis may be the batch: it has others, and a free length."""
        return len(self.shape) > 1 and not isinstance(self.shape[0], int)

    def problem(self, value: Any) -> str | None:
        """Why `value` cannot be fed here, or None. Arrays and OrtValues can."""
        if not (isinstance(value, np.ndarray) or hasattr(value, "data_type")):
            return f"{self.name} must be a numpy array, and is a {type(value).__name__}; expected {self}"
        if not self.dtype:
            return None
        if isinstance(value, np.ndarray):
            found = str(value.dtype)
            fits = value.dtype == np.dtype(self.dtype)
        else:
            found = value.data_type()
            fits = found == self.type
        if not fits:
            return f"{self.name} must be {self.dtype}, and is {found}; convert it with .astype({self.dtype!r})"
        shape = shape_of(value)
        if not self.shape:
            return None
        if len(shape) != len(self.shape):
            return f"{self.name} must have {len(self.shape)} axes, and has {len(shape)}: {list(shape)}; expected {self}"
        for dim, length in zip(self.shape, shape, strict=True):
            if isinstance(dim, int) and dim != length:
                return f"{self.name} must have the shape {self}, and has {list(shape)}"
        return None


@dataclass(frozen=True)
class Signature:
    """A graph's own inputs and outputs. `reserved` are the inputs that adapters fill."""

    inputs: Mapping[str, _Slot]
    outputs: Mapping[str, _Slot]
    reserved: frozenset[str]

    @staticmethod
    def of(session: Any, reserved: frozenset[str]) -> Signature:
        inputs = {arg.name: _Slot.of(arg) for arg in session.get_inputs()}
        for arg in session.get_overridable_initializers():
            if arg.name not in reserved:
                inputs[arg.name] = _Slot.of(arg, required=False)
        outputs = {arg.name: _Slot.of(arg) for arg in session.get_outputs()}
        return Signature(inputs, outputs, reserved)

    @property
    def plain(self) -> bool:
        """Whether everything is a tensor that numpy and OrtValue both hold (no strings, no sequences)."""
        return all(slot.dtype for slot in (*self.inputs.values(), *self.outputs.values()))

    def check_feeds(self, feeds: Mapping[str, Any]) -> None:
        """Raises FeedError: an input is missing, unknown, reserved, or of the wrong kind."""
        if not isinstance(feeds, Mapping):
            raise FeedError(f"input_feed must map input names to arrays, and is a {type(feeds).__name__}")
        problems: list[str] = []
        for name in feeds:
            if name in self.reserved:
                problems.append(f"{name} is filled by the adapter chosen; load one and name it: run(..., adapter=...)")
            elif name not in self.inputs:
                problems.append(f"{name!r} is no input of this graph")
        for name, slot in self.inputs.items():
            if slot.required and name not in feeds:
                problems.append(f"{name} is missing; expected {slot}")
        for name, value in feeds.items():
            if name in self.inputs:
                problem = self.inputs[name].problem(value)
                if problem is not None:
                    problems.append(problem)
        if problems:
            expected = ", ".join(self.inputs)
            raise FeedError(f"the feeds do not fit; this graph's inputs are {expected}", problems=problems)

    def output_names(self, asked: Sequence[str] | None) -> list[str]:
        """The outputs to compute: those asked for, or all. Raises FeedError: there is no such output."""
        if asked is None:
            return list(self.outputs)
        if isinstance(asked, str) or not isinstance(asked, Sequence):
            raise FeedError(f"output_names must be a list of names or None for all, and is {asked!r}")
        unknown = [name for name in asked if name not in self.outputs]
        if unknown:
            raise FeedError(
                f"this graph's outputs are {', '.join(self.outputs)}",
                problems=[f"{name!r} is no output of this graph" for name in unknown],
            )
        return list(asked) or list(self.outputs)

    def check_rows(self, rows: int, feeds: Mapping[str, Any]) -> None:
        """Raises SelectionError: the batch fed does not have `rows` rows."""
        lengths: dict[str, int] = {}
        for name, value in feeds.items():
            shape = shape_of(value)
            if len(shape) > 1:
                lengths[name] = shape[0]
        free = {name: length for name, length in lengths.items() if self.inputs[name].batched}
        wrong = {name: length for name, length in free.items() if length != rows}
        if not free and rows not in lengths.values():
            wrong = lengths
        problems = [f"{name} has {length} rows" for name, length in wrong.items()]
        if not lengths:
            problems = ["no input has a batch axis"]
        if problems:
            raise SelectionError(
                f"one choice per row means as many as the batch has rows; {rows} were given", problems=problems
            )


def shape_of(value: Any) -> tuple[int, ...]:
    """Of an array or an OrtValue."""
    return tuple(value.shape) if isinstance(value, np.ndarray) else tuple(value.shape())
