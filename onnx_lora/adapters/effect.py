"""How far an adapter moves each weight of a package: ‖ΔW‖ / ‖W0‖, in Frobenius norms. It knows bound adapters; it draws
nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_lora.adapters.adapter import BoundAdapter
from onnx_lora.package import Package
from onnx_lora.points import InjectionPoint

__all__ = ["effects"]


def effects(bound: BoundAdapter, package: Package) -> Mapping[str, float]:
    """‖ΔW‖ / ‖W0‖ of every module that the adapter changes, in the package's order; infinite where W0 is zero.

    Whole weights that it brings are not among them: they have no W0 left to speak of.
    """
    moved: dict[str, float] = {}
    for module in bound.coverage.applied:
        point = package.points[module]
        weight = package.module_weight(point)
        size, change = float(np.linalg.norm(weight.astype(np.float64))), _change(bound, point, package)
        moved[module] = change / size if size else float("inf") if change else 0.0
    return moved


def _change(bound: BoundAdapter, point: InjectionPoint, package: Package) -> float:
    """‖ΔW‖."""
    scale, method = bound.tensors.get(point.dora_scale), bound.changes.get(point.module)
    if scale is None and method is None:
        # Of a pair of factors without their product: ‖A·B‖² is the sum of AᵀA times B·Bᵀ, element by element.
        a, b = (bound.tensors[name][0].astype(np.float64) for name in (point.lora_a, point.lora_b))
        return float(np.sqrt(max(0.0, np.sum((a.T @ a) * (b @ b.T)))))
    before = package.module_weight(point).astype(np.float32)
    if method is not None:
        after = point.from_torch(method.apply_to(point.to_torch(before)))
    else:
        assert scale is not None  # one of the two is there
        after = before.copy()
        if point.lora_a in bound.tensors:
            after += bound.tensors[point.lora_a][0] @ bound.tensors[point.lora_b][0]
        after *= scale[0]
    return float(np.linalg.norm(np.subtract(after, before, dtype=np.float64)))
