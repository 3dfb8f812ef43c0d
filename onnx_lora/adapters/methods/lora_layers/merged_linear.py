"""MergedLinear: one weight for several projections, some of them with LoRA's factors of their own.

Microsoft's loralib 0.1.2, `MergedLinear.merge_AB`, and PEFT before 0.4, `MergedLinear.forward`. The weight's outputs
are as many equal parts as `enable_lora` has entries, and the parts that it marks have factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnx_lora.adapters.adapter import Delta
from onnx_lora.adapters.methods.method import DocsRow, Module
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.points import Array

__all__ = ["DOCS", "join_groups", "read_merged_linear"]

DOCS = DocsRow("`enable_lora` (MergedLinear of PEFT before 0.4)", "delta, B in the blocks of a diagonal")


def read_merged_linear(module: Module, a: Array, b: Array) -> Delta:
    """`lora_A` `[groups · r, in]` and `lora_B` `[outputs with factors, r]`, with `enable_lora` of the config.

    Raises TensorError: `enable_lora` marks no projection, the rank is not the config's, or the shapes do not fit.
    """
    enabled = module.fields.get("enable_lora")
    are_marks = isinstance(enabled, list) and all(type(mark) is bool for mark in enabled)
    if not are_marks or not any(enabled):
        raise TensorError(f"enable_lora must mark the projections that have factors, and is {abbreviate(enabled)}")
    module.must(
        b.ndim > 1 and b.shape[1] == module.rank,
        f"the rank must be {module.rank} by adapter_config.json, and lora_B has shape {b.shape}",
    )
    return join_groups(a, b, enabled, module.scale)


def join_groups(a: Array, b: Array, enable_lora: Sequence[bool], scale: float) -> Delta:
    """The factors of all projections as one pair: B's groups in the blocks of a diagonal, and rows of zeros for the
    projections that have none.

    `a` `[groups · r, in]`; `b` `[outputs with factors, r]`, or `[…, r, 1]` as a convolution keeps it. loralib has a
    group for each part with factors, PEFT always two; B's shape says which.

    Raises TensorError: the shapes are of no such factors.
    """
    count = sum(enable_lora)
    is_matrix = b.ndim >= 2 and math.prod(b.shape[2:]) == 1
    are_matrices = a.ndim == 2 and is_matrix
    if not are_matrices or a.size == 0 or b.size == 0 or count == 0:
        raise TensorError(
            "the factors of MergedLinear must be [groups · r, in] and [out, r, 1], and have shapes "
            f"{a.shape} and {b.shape}"
        )
    matrix: Array = b.reshape(b.shape[:2])
    outputs, rank = matrix.shape
    total_rank = len(a)
    groups = total_rank // rank
    are_groups = total_rank == groups * rank and outputs % groups == 0
    is_for_marks = outputs % count == 0 and groups in (count, 2)
    if not are_groups or not is_for_marks:
        raise TensorError(
            f"the factors of MergedLinear must have {count} groups (or PEFT's 2), and their shapes {a.shape} and "
            f"{b.shape} have {total_rank / rank:g}"
        )
    diagonal = np.zeros((outputs, total_rank), matrix.dtype)
    outputs_of_group = outputs // groups
    for group in range(groups):
        rows = slice(group * outputs_of_group, (group + 1) * outputs_of_group)
        columns = slice(group * rank, (group + 1) * rank)
        diagonal[rows, columns] = matrix[rows]
    outputs_of_projection = outputs // count
    has_factors = np.repeat(np.array(enable_lora, bool), outputs_of_projection)
    padded = np.zeros((len(has_factors), total_rank), matrix.dtype)
    padded[has_factors] = diagonal
    return Delta(a, padded, scale)
