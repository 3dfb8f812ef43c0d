"""What branches are built of: the view that a branch reads, its inputs, and what a builder of branches must answer. The
builders stand with their kinds, in `graph_kinds`. They do not know where `inject` adds what they build.

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
    """What a branch reads, with the batch as its first axis.

    `rank`: the number of axes of what the branch gives; a lookup gives one more than it reads. `undo`: the operator and
    its axis that lead from the branch's axes back to the product's; None where they are the same.
    """

    value: ir.Value
    rank: int
    undo: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class BranchInputs:
    """What one branch computes with: the factors `a` and `b`, and the product beside which it stands.

    `name` begins the names of its nodes. `per_row`: whether each row of the batch may have an adapter of its own.
    """

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
    """A factor `[rows, m, n]` with axes of 1 behind its rows, so that they meet the first of `rank` axes."""
    if rank == 3:
        return factor
    between = list(range(1, rank - 2))
    return surgeon.unsqueeze(factor, between, name=f"{factor.name}.rows")


def gather_number(surgeon: Surgeon, shape: ir.Value, axis: int, name: str) -> ir.Value:
    """The length of one axis of a shape, as a scalar."""
    return surgeon.op("Gather", shape, surgeon.integer(axis), name=name)


def number_own_rows(surgeon: Surgeon, shape: ir.Value, factor: ir.Value, name: str) -> ir.Value:
    """For each row of the batch, the number of the factor's row that is its own: `[batch, 1]`.

    `shape`: that of a value whose first axis is the batch. Row i of the batch uses row i mod rows of the factor: row 0,
    where one adapter serves all.
    """
    factor_shape = surgeon.op("Shape", factor, name=f"{name}.lora_shape")
    rows = gather_number(surgeon, factor_shape, 0, f"{name}.rows_of_lora")
    count = gather_number(surgeon, shape, 0, f"{name}.batch")
    zero, one = surgeon.integer(0), surgeon.integer(1)
    each = surgeon.op("Range", zero, count, one, name=f"{name}.range")
    row = surgeon.op("Mod", each, rows, name=f"{name}.row")
    return surgeon.unsqueeze(row, [1], name=f"{name}.rows")
