"""Deltas and other changes, laid out as the tensors of injection points. It knows points, and no whole weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.adapters.adapter import NO_SCALE, Change, Delta, MatrixDelta
from onnx_lora.adapters.factors import (
    as_matrices,
    change_as_factors,
    change_problems,
    column_norms,
    delta_problems,
    depends_on_weight,
)
from onnx_lora.adapters.problems import value_problems
from onnx_lora.adapters.tensor_layout import TensorLayout, frozen_copy

if TYPE_CHECKING:
    from onnx_lora.package import Package
    from onnx_lora.points import Array, InjectionPoint

__all__ = ["PointLayout"]


@dataclass
class PointLayout:
    """What an adapter does at the injection points of a package, put in module by module.

    `base_digests`: of the weights to which the adapter was bound before, as in `Adapter`. `changes`: those that only
    folding can apply. `magnitudes` and `made_of`: as in `BoundAdapter`. `fold_only`: the modules that cannot run
    unfolded, and why.
    """

    package: Package
    layout: TensorLayout
    base_digests: Mapping[str, str]
    changes: dict[str, Change] = field(default_factory=dict)
    magnitudes: dict[str, Array] = field(default_factory=dict)
    made_of: dict[str, str] = field(default_factory=dict)
    fold_only: dict[str, str] = field(default_factory=dict)

    def add_delta(self, point: InjectionPoint, delta: Delta | MatrixDelta) -> None:
        """A pair of factors as the inputs A `[1, in, r]` and B `[1, r, out]`, with the scale in B."""
        problems = delta_problems(point, delta)
        if problems:
            self.layout.problems.extend(problems)
            return
        matrices = as_matrices(point, delta)
        self.layout.put(point.lora_a, matrices.a.T[None], point.dtype)
        self.layout.put(point.lora_b, _scaled_b(matrices)[None], point.dtype)
        if matrices.magnitude is not None:
            self._add_magnitude(point, matrices.magnitude, matrices.output_scale)
        elif matrices.output_scale is not None:
            self._add_output_scale(point, matrices.output_scale)

    def add_change(self, point: InjectionPoint, change: Change) -> None:
        """A change as a factor for each output, or as a pair of factors, where it is one of these for this base's
        weight. Any other change can only be folded."""
        problems = change_problems(point, change)
        if problems:
            self.layout.problems.extend(problems)
            return
        scale = change.output_scale()
        if scale is not None:
            self.layout.problems.extend(value_problems(f"{point.module}, {change.method}", scale))
            self._add_output_scale(point, scale)
            return
        delta = change_as_factors(change, point, self.package.module_weight(point))
        if delta is not None:
            if depends_on_weight(change, delta, point.torch_shape):
                self.made_of[point.module] = self.package.mark(point)
            self.add_delta(point, delta)
            return
        self.changes[point.module] = change
        self.fold_only[point.module] = f"{change.method} changes the weight in a way that no pair of factors expresses"

    def _add_magnitude(self, point: InjectionPoint, magnitude: Array, known_scale: Array | None) -> None:
        """DoRA's scale of the outputs, m / ‖W0 + A · B‖.

        known_scale: the scale in a converted file. It holds for the weight that it was computed from; a quantized
            weight has other norms.
        """
        scale = known_scale if self._is_known_weight(point) else None
        if scale is None:
            scale = self._dora_scale(point, magnitude)
        if scale is None:
            return
        self.magnitudes[point.module] = frozen_copy(magnitude, magnitude.dtype)
        self.made_of[point.module] = self.package.mark(point)
        self._add_output_scale(point, scale)

    def _is_known_weight(self, point: InjectionPoint) -> bool:
        """Whether the adapter was bound to the very weight that the point has here."""
        return not point.is_quantized and self.base_digests.get(point.module) == point.sha256

    def _dora_scale(self, point: InjectionPoint, magnitude: Array) -> Array | None:
        """The scale, computed from this package's W0. None, and a problem says why: a norm is zero."""
        a = self.layout.tensors[point.lora_a][0]
        b = self.layout.tensors[point.lora_b][0]
        norms = column_norms(self.package.module_weight(point), a, b)
        zero_norms = int((norms == 0).sum())
        if zero_norms:
            self.layout.problems.append(
                f"{point.module}: DoRA divides by the norms of the weight's outputs, and {zero_norms} of {norms.size} "
                "are zero"
            )
            return None
        scale: Array = np.divide(magnitude, norms, dtype=np.float64)
        return scale

    def _add_output_scale(self, point: InjectionPoint, scale: Array) -> None:
        """A factor for each output, as the input `[1, 1, out]`; a package without that input can only be folded."""
        if scale.shape != (point.out_features,):
            self.layout.problems.append(
                f"{point.module}: the scale of its outputs must have shape ({point.out_features},), "
                f"and has {scale.shape}"
            )
            return
        self.layout.put(point.dora_scale, scale[None, None], point.dtype)
        if point.module not in self.package.dora:
            self.fold_only[point.module] = NO_SCALE


def _scaled_b(delta: MatrixDelta) -> Array:
    """scale · Bᵀ `[r, out]`, in float64 unless the scale is 1, so that scaling and casting round once together."""
    b: Array = delta.b.T
    if delta.scale == 1.0:
        return b
    with np.errstate(over="ignore"):
        scaled: Array = b.astype(np.float64) * delta.scale
    return scaled
