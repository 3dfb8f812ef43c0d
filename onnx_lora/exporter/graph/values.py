"""Initializers of a graph: what leads from one to the node that computes with it, and its numbers. It knows ONNX's
values, and no module."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "WRAPPERS",
    "axes_of",
    "count_of",
    "initializer_behind",
    "input_at",
    "is_constant",
    "numbers_of",
    "numpy_type_of",
    "only_user",
    "producer_of",
    "rows_and_columns",
    "shape_of",
    "unwrap",
]

# Operators that may stand between an initializer and the node that computes with it: they turn it or cast it, and
# compute nothing. This is the one list of them: for finding a weight, for untying it, and for quantizing it.
WRAPPERS = frozenset(["Cast", "Identity", "Transpose"])

# Types of two numbers a byte, and what numpy can compute with in their place.
_UNPACKED = {"int4": np.int8, "uint4": np.uint8}


def unwrap(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """The initializer behind wrappers, or None; and the wrappers, the one nearest to the user first."""
    wrappers: list[ir.Node] = []
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in WRAPPERS:
            break
        wrappers.append(node)
        value = node.inputs[0]
    return (value if is_constant(value) else None), tuple(wrappers)


def initializer_behind(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind wrappers, or None: the value is computed, or is the caller's."""
    initializer, _ = unwrap(value)
    return initializer


def is_constant(value: ir.Value | None) -> bool:
    """Whether it is an initializer that the graph's caller cannot replace."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def input_at(node: ir.Node, position: int) -> ir.Value | None:
    """A node's input, or None where it has none at that position."""
    return node.inputs[position] if len(node.inputs) > position else None


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of that operator."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        return None
    return node


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that uses a value, if it is of that operator and the graph's caller does not get the value."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type == op_type else None


def axes_of(value: ir.Value | None) -> int | None:
    """The number of axes, or None where it cannot be told."""
    return None if value is None or value.shape is None else value.shape.rank()


def rows_and_columns(value: ir.Value) -> tuple[int, int]:
    """The lengths of a matrix, whose shape the graph says."""
    assert value.shape is not None
    rows, columns = value.shape.numpy()
    return int(rows), int(columns)


def shape_of(initializer: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer's tensor, whatever else the graph says of it."""
    assert initializer.const_value is not None
    return tuple(int(size) for size in initializer.const_value.shape.numpy())


def count_of(initializer: ir.Value) -> int:
    """How many numbers an initializer holds."""
    assert initializer.const_value is not None
    return int(initializer.const_value.size)


def numpy_type_of(*values: ir.Value) -> str:
    """numpy's name for the type of the first value whose type is known."""
    for value in values:
        if value.dtype is not None:
            return value.dtype.numpy().name
    return "unknown"


def numbers_of(initializer: ir.Value) -> NDArray[Any]:
    """An initializer's numbers; 4-bit ones as 8-bit ones, which numpy can compute with."""
    assert initializer.const_value is not None
    numbers: NDArray[Any] = initializer.const_value.numpy()
    unpacked = _UNPACKED.get(numbers.dtype.name)
    return numbers if unpacked is None else numbers.astype(unpacked)
