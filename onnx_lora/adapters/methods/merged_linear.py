"""MergedLinear: one weight for several projections, some of them with LoRA's factors of their own.

Microsoft's loralib 0.1.2, `MergedLinear.merge_AB`, and PEFT before 0.4, `MergedLinear.forward`. The weight's outputs
are as many equal parts as `enable_lora` has entries, and the parts that it marks have factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnx_lora.adapters.adapter import Delta
from onnx_lora.adapters.formats.problem import TensorError, shown
from onnx_lora.adapters.methods.method import DocsRow, Module
from onnx_lora.points import Array

__all__ = ["DOCS", "merged_linear", "read_merged_linear"]

DOCS = DocsRow("`enable_lora` (MergedLinear of PEFT before 0.4)", "delta, B in the blocks of a diagonal")


def read_merged_linear(module: Module, a: Array, b: Array) -> Delta:
    """`lora_A` `[groups · r, in]` and `lora_B` `[outputs with factors, r]`, with `enable_lora` of the config.

    Raises TensorError: `enable_lora` marks no projection, the rank is not the config's, or the shapes do not fit.
    """
    enabled = module.fields.get("enable_lora")
    if not isinstance(enabled, list) or not all(type(each) is bool for each in enabled) or not any(enabled):
        raise TensorError(f"enable_lora must mark the projections that have factors, and is {shown(enabled)}")
    module.must(
        b.ndim > 1 and b.shape[1] == module.rank,
        f"the rank must be {module.rank} by adapter_config.json, and lora_B has shape {b.shape}",
    )
    return merged_linear(a, b, enabled, module.scale)


def merged_linear(a: Array, b: Array, enable_lora: Sequence[bool], scale: float) -> Delta:
    """The factors as one pair: B's groups in the blocks of a diagonal, zeros where a projection has none.

    `a` `[groups · r, in]`; `b` `[outputs with factors, r]`, or `[…, r, 1]` as a convolution keeps it. loralib has a
    group for each part with factors, PEFT always two; B's shape says which.

    Raises TensorError: the shapes are of no such factors.
    """
    count = sum(map(bool, enable_lora))
    is_matrix = b.ndim >= 2 and math.prod(b.shape[2:]) == 1
    if a.ndim != 2 or not is_matrix or not a.size or not b.size or not count:
        raise TensorError(
            "the factors of MergedLinear must be [groups · r, in] and [out, r, 1], and have shapes "
            f"{a.shape} and {b.shape}"
        )
    matrix: Array = b.reshape(b.shape[:2])
    outputs, rank = matrix.shape
    groups = len(a) // rank
    fits = len(a) == groups * rank and outputs % groups == 0 and outputs % count == 0
    if not fits or groups not in (count, 2):
        raise TensorError(
            f"the factors of MergedLinear must have {count} groups (or PEFT's 2), and their shapes {a.shape} and "
            f"{b.shape} have {len(a) / rank:g}"
        )
    dense = np.zeros((outputs, len(a)), matrix.dtype)
    step = outputs // groups
    for group in range(groups):
        own = slice(group * step, (group + 1) * step)
        dense[own, group * rank : (group + 1) * rank] = matrix[own]
    part = outputs // count
    padded = np.zeros((part * len(enable_lora), len(a)), matrix.dtype)
    padded[np.repeat(np.array(enable_lora, bool), part)] = dense
    return Delta(a, padded, scale)
