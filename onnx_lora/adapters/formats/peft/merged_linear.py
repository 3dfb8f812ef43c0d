"""Microsoft's loralib and PEFT before 0.4: one weight for several projections, some of them with factors of their own
(`MergedLinear`). It knows their layout, and no file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lora.adapters.adapter import Delta
from onnx_lora.adapters.formats.builder import as_matrix
from onnx_lora.points import Array

__all__ = ["merged_linear"]


def merged_linear(a: Array, b: Array, enable_lora: Sequence[bool], scale: float) -> Delta | str:
    """The factors as one pair: B's groups in the blocks of a diagonal, zeros where a projection has none. Or what is
    wrong with them.

    `a` `[groups · r, in]`; `b` `[outputs with factors, r]`, or `[…, r, 1]` as a convolution keeps it. The weight's
    outputs are as many equal parts as `enable_lora` has entries. loralib has a group for each part with factors, PEFT
    always two; B's shape says which. loralib 0.1.2, `MergedLinear.merge_AB`; PEFT 0.2, `MergedLinear.forward`.
    """
    matrix = as_matrix(b) if b.ndim > 1 else None
    count = sum(map(bool, enable_lora))
    if a.ndim != 2 or matrix is None or not a.size or not matrix.size or not count:
        shapes = f"{a.shape} and {b.shape}"
        return f"the factors of MergedLinear must be [groups · r, in] and [out, r, 1], and have shapes {shapes}"
    outputs, rank = matrix.shape
    groups = len(a) // rank
    if len(a) != groups * rank or outputs % groups or outputs % count or groups not in (count, 2):
        return (
            f"the factors of MergedLinear must have {count} groups (or PEFT's 2), and their shapes {a.shape} and "
            f"{b.shape} have {len(a) / rank:g}"
        )
    part = outputs // count
    dense = np.zeros((outputs, len(a)), matrix.dtype)
    step = outputs // groups
    for group in range(groups):
        own = slice(group * step, (group + 1) * step)
        dense[own, group * rank : (group + 1) * rank] = matrix[own]
    padded = np.zeros((part * len(enable_lora), len(a)), matrix.dtype)
    padded[np.repeat(np.array(enable_lora, bool), part)] = dense
    return Delta(a, padded, scale)
