"""What branches are built of: the view that one reads, its inputs, and what a builder of branches answers. The builders
stand with their kinds, in `graph_kinds`; where the result is added, they do not know.

A is `[rows, in, rank]` and B `[rows, rank, out]` for all of them, and rows are 1 or the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from onnx_lora.exporter.graph.product import Product
from onnx_lora.exporter.surgery.surgeon import Surgeon

__all__ = ["BranchBuilder", "BranchInputs", "View", "broadcast", "gather_number", "number_own_rows"]


@dataclass(frozen=True, slots=True)
class View:
    """What a branch reads, the batch first, and the number of axes of what it gives (of a lookup one more than
    of what it reads); `undo` leads back from there: operator and axis."""

    value: ir.Value
    rank: int
    undo: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class BranchInputs:
    """What one branch computes with. `name` begins the names of its nodes; `per_row`: whether each row of the batch may
    have an adapter of its own."""

    view: View
    a: ir.Value
    b: ir.Value
    product: Product
    name: str
    per_row: bool


class BranchBuilder(Protocol):
    """Writes the nodes of one kind's branches."""

    def build_delta(self, surgeon: Surgeon, given: BranchInputs) -> ir.Value:
        """(x · A) · B, in the axes of the view."""

    def shape_scale(self, surgeon: Surgeon, scale: ir.Value, product: Product, rank: int, name: str) -> ir.Value:
        """DoRA's scale `[rows, 1, out]`, so that it meets the outputs of a product of `rank` axes."""

    def shape_bias(self, surgeon: Surgeon, bias: ir.Value, product: Product, name: str) -> ir.Value:
        """What the node adds, so that it meets the outputs of the product."""


def broadcast(surgeon: Surgeon, factor: ir.Value, rank: int) -> ir.Value:
    """`[rows, m, n]` so that it meets rows with the first of `rank` axes, not the third last."""
    if rank == 3:
        return factor
    return surgeon.unsqueeze(factor, list(range(1, rank - 2)), name=f"{factor.name}.rows")


def gather_number(surgeon: Surgeon, shape: ir.Value, axis: int, name: str) -> ir.Value:
    """One number of a shape, as a scalar."""
    return surgeon.op("Gather", shape, surgeon.integer(axis), name=name)


def number_own_rows(surgeon: Surgeon, shape: ir.Value, factor: ir.Value, name: str) -> ir.Value:
    """For each row of the batch, the number of the factor's row that is its own: `[batch, 1]`.

    `shape`: of a value whose first axis is the batch. One adapter for all rows has row 0 alone: i mod rows.
    """
    factor_shape = surgeon.op("Shape", factor, name=f"{name}.lora_shape")
    rows = gather_number(surgeon, factor_shape, 0, f"{name}.rows_of_lora")
    count = gather_number(surgeon, shape, 0, f"{name}.batch")
    each = surgeon.op("Range", surgeon.integer(0), count, surgeon.integer(1), name=f"{name}.range")
    row = surgeon.op("Mod", each, rows, name=f"{name}.row")
    return surgeon.unsqueeze(row, [1], name=f"{name}.rows")
