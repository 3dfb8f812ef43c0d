"""Folding into quantized weights: the change is added to floats and the sum is rounded again, with the
caller's permission, and the error is measured. It knows arithmetic; it knows neither ONNX nor sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_lora.boundary import public
from onnx_lora.errors import BindError
from onnx_lora.package import Package
from onnx_lora.points import Array, WeightPart
from onnx_lora.quantized import Scheme, dequantize, quantize
from onnx_lora.runtime.merge import InitializerEdit, LowRankEdit, MethodEdit, fold_weight

__all__ = ["Requantize", "Rounding", "compute_values"]


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding a folded weight to its few bits cost one module, as ratios of Frobenius norms.

    `of_weight`: the error to the folded weight. `of_change`: how far the change that arrived is from the
    adapter's own, to that; from 1 on, rounding moved the weight further than the adapter did.
    """

    of_weight: float
    of_change: float


@public
@dataclass
class Requantize:
    """The permission to fold into quantized weights; `rounding` says afterwards what that cost, by module.

    source: the float package that the quantized one was made from: its weights plus the change are
        quantized. Without it the quantized weights are taken for exact, and rounded a second time.
    """

    source: Package | None = None
    rounding: dict[str, Rounding] = field(default_factory=dict)

    def weight(self, module: str, quantized: Package) -> Array | None:
        """The source's weight `[in, out]`, if there is a source. Raises BindError: it is another base's."""
        if self.source is None:
            return None
        if self.source.quantized:
            raise BindError("the source must be a float package, and is quantized itself", path=self.source.path)
        own, point = quantized.points[module], self.source.points.get(module)
        if point is None or point.sha256 != own.sha256:
            found = "no point there" if point is None else f"the digest {point.sha256[:12]} there"
            raise BindError(
                f"the source must be the float package that this one was made from; {module} has the digest "
                f"{own.sha256[:12]}, and {found}",
                path=self.source.path,
            )
        return self.source.module_weight(point)


def compute_values(edit: InitializerEdit, package: Package, requantize: Requantize | None) -> Mapping[str, Array]:
    """The new values of every initializer that an edit changes; 4-bit numbers as 8-bit ones.

    Raises BindError: as `fold_weight`, or a weight is quantized and the caller gave no permission.
    """
    if not edit.quantized:
        return {edit.initializer: fold_weight(edit, package)}
    if requantize is None:
        modules = ", ".join(dict.fromkeys(change.module for change in edit.changes))
        raise BindError(
            f"{modules}: the weight is quantized, and folding would round it again; run the adapter unfolded, which "
            "is exact, or allow it: `requantize=Requantize()`"
        )
    return _fold_quantized(edit, package, requantize)


@dataclass(frozen=True, slots=True)
class _Weights:
    """A weight `[in, out]` in float32 at four stages of a fold."""

    base: Array  # as the quantized one is used
    start: Array  # what the change is added to: the source's, or the base's
    wanted: Array  # with the change
    rounded: Array  # quantized again


def _fold_quantized(edit: InitializerEdit, package: Package, requantize: Requantize) -> dict[str, Array]:
    part = edit.changes[0].part
    assert part.quantized is not None  # the edit is of a quantized weight
    scheme = part.quantized.scheme
    old = _read_tensors(part, package)
    base = np.array(package.weight(part), np.float32)
    start = _start_values(edit, base, package, requantize)
    wanted = start.copy()
    for change in edit.changes:
        change.apply(wanted, package)
    new = _quantize_like(old, wanted, scheme, edit.changes[0].module)
    outputs = base.shape[0] if part.transposed else base.shape[1]
    touched = _find_touched(edit, outputs)
    new = [_keep_untouched(made, was, touched, scheme, part) for made, was in zip(new, old, strict=True)]
    zero_point = new[2] if len(new) > 2 else None
    rounded = dequantize(scheme, new[0], new[1], zero_point)
    weights = _Weights(base, start, wanted, rounded)
    for change in edit.changes:
        _record_rounding(requantize, change.module, _measure_rounding(change, weights))
    return dict(zip(edit.tensors, new, strict=True))


def _record_rounding(requantize: Requantize, module: str, rounding: Rounding) -> None:
    """Of a module that lies in several initializers the worst counts."""
    known = requantize.rounding.get(module)
    if known is None or rounding.of_change > known.of_change:
        requantize.rounding[module] = rounding


def _start_values(edit: InitializerEdit, base: Array, package: Package, requantize: Requantize) -> Array:
    """The weight that the change is added to: the source's where there is a source."""
    start = base.copy()
    for change in edit.changes:
        source = requantize.weight(change.module, package)
        if source is not None:
            outputs = slice(change.part.first, change.part.first + change.part.outputs)
            change.part.window(start)[...] = source[:, outputs]
    return start


def _quantize_like(old: list[Array], wanted: Array, scheme: Scheme, module: str) -> list[Array]:
    """`wanted` in few bits, with the types and shapes of the tensors that it replaces.

    Raises BindError: those types cannot hold it.
    """
    zero_point = old[2] if len(old) > 2 else None
    unsigned = old[0].dtype == np.uint8 and zero_point is None and scheme.layout == "affine"
    if unsigned and wanted.min() < 0:
        raise BindError(f"{module}: unsigned weights without a zero point hold no negative numbers")
    made = [tensor for tensor in quantize(scheme, wanted, old[0], zero_point) if tensor is not None]
    new: list[Array] = []
    with np.errstate(over="ignore"):
        for tensor, was in zip(made, old, strict=True):
            new.append(np.asarray(tensor, was.dtype).reshape(was.shape))
    if not np.isfinite(new[1]).all():
        raise BindError(f"{module}: the folded weight needs scales beyond what {new[1].dtype} holds")
    return new


def _read_tensors(part: WeightPart, package: Package) -> list[Array]:
    """Values, scale, and the zero point where there is one."""
    places = [part.stored]
    if part.quantized is not None:
        places += [tensor.stored for tensor in part.quantized.tensors]
    return [np.asarray(package.read(place)) for place in places]


def _find_touched(edit: InitializerEdit, outputs: int) -> Array:
    """Which outputs of an initializer an adapter changes: `[out]`, bool."""
    touched = np.zeros(outputs, bool)
    for change in edit.changes:
        touched[change.part.start : change.part.start + change.part.outputs] = True
    return touched


def _keep_untouched(new: Array, was: Array, touched: Array, scheme: Scheme, part: WeightPart) -> Array:
    """A new tensor, with the old numbers at outputs that no adapter touches, if every output has scales of its own.

    new, was: the values, the scales or the zero points. touched: which outputs change, `[out]`.
    """
    if scheme.layout == "blocks" and not part.transposed:
        return new  # a table's blocks lie along its outputs
    if scheme.layout == "blocks":
        rows = touched.size
        kept = np.where(touched[:, None], new.reshape(rows, -1), was.reshape(rows, -1))
        return kept.reshape(was.shape)
    output_axis = 0 if part.transposed else 1
    has_blocks = bool(scheme.block_size)
    if scheme.axis < 0 or not was.ndim or (scheme.axis == output_axis) == has_blocks:
        return new  # outputs share scales
    along_outputs = touched if was.ndim == 1 or output_axis == 1 else touched[:, None]
    return np.where(along_outputs, new, was)


def _measure_rounding(change: LowRankEdit | MethodEdit, weights: _Weights) -> Rounding:
    """What rounding cost one module. The change that arrived is measured from the base as it runs."""

    def window(weight: Array) -> Array:
        return change.part.window(weight).astype(np.float32, copy=False)

    wanted, rounded = window(weights.wanted), window(weights.rounded)
    meant = np.subtract(wanted, window(weights.start))
    arrived = np.subtract(rounded, window(weights.base))
    return Rounding(
        of_weight=_norm(np.subtract(rounded, wanted)) / (_norm(wanted) or 1.0),
        of_change=_norm(np.subtract(arrived, meant)) / (_norm(meant) or 1.0),
    )


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values))
