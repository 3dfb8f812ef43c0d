"""How far an adapter moves each weight of a package: ‖ΔW‖ / ‖W0‖, in Frobenius norms. It knows bound adapters; it draws
nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.adapters.adapter import BoundAdapter
from onnx_lora.adapters.factors import apply_change

if TYPE_CHECKING:
    from onnx_lora.package import Package
    from onnx_lora.points import Array, InjectionPoint

__all__ = ["effects"]


def effects(bound: BoundAdapter, package: Package) -> Mapping[str, float]:
    """‖ΔW‖ / ‖W0‖ of every module that the adapter changes, in the package's order; infinite where W0 is zero.

    Whole weights that it brings are not among them: they have no W0 left to compare with.
    """
    moved: dict[str, float] = {}
    for module in bound.coverage.applied:
        point = package.points[module]
        weight = package.module_weight(point)
        weight_norm = float(np.linalg.norm(weight.astype(np.float64)))
        change_norm = _change_norm(bound, point, weight)
        if weight_norm:
            moved[module] = change_norm / weight_norm
        else:
            moved[module] = float("inf") if change_norm else 0.0
    return moved


def _change_norm(bound: BoundAdapter, point: InjectionPoint, weight: Array) -> float:
    """‖ΔW‖; `weight`: W0 `[in, out]`."""
    change = bound.changes.get(point.module)
    scale = bound.tensors.get(point.dora_scale)
    if change is None and scale is None:
        return _product_norm(bound.tensors[point.lora_a][0], bound.tensors[point.lora_b][0])
    before = weight.astype(np.float32)
    after: Array = before.copy()
    if change is not None:
        after = point.from_torch(apply_change(change, point.to_torch(before)))
    elif scale is not None:
        if point.lora_a in bound.tensors:
            after = after + bound.tensors[point.lora_a][0] @ bound.tensors[point.lora_b][0]
        after = after * scale[0]
    difference = np.subtract(after, before, dtype=np.float64)
    return float(np.linalg.norm(difference))


def _product_norm(a: Array, b: Array) -> float:
    """‖A · B‖ without the product: its square is the sum of AᵀA times B·Bᵀ, element by element.

    `a` `[in, r]`, `b` `[r, out]`.
    """
    wide_a = a.astype(np.float64)
    wide_b = b.astype(np.float64)
    gram_a = wide_a.T @ wide_a
    gram_b = wide_b @ wide_b.T
    square = float(np.sum(gram_a * gram_b))
    return float(np.sqrt(max(0.0, square)))  # rounding may leave less than zero
