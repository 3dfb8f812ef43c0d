"""Folding into quantized weights: the change is added to floats and the sum is rounded again, with leave and with
the error measured. It knows arithmetic; it knows neither ONNX nor sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_lora.boundary import public
from onnx_lora.errors import BindError
from onnx_lora.package import Package
from onnx_lora.points import Array, WeightPart
from onnx_lora.quantized import Scheme, dequantize, quantize
from onnx_lora.runtime.merge import Changed, Edit, Low, folded

__all__ = ["Requantize", "Rounding", "merged"]


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
    """Leave to fold into quantized weights; `rounding` says afterwards what that cost, by module.

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


def merged(edit: Edit, package: Package, requantize: Requantize | None) -> Mapping[str, Array]:
    """The new values of every initializer that an edit changes; 4-bit numbers as 8-bit ones.

    Raises BindError: as `folded`, or a weight is quantized and nobody gave leave.
    """
    if not edit.quantized:
        return {edit.initializer: folded(edit, package)}
    if requantize is None:
        modules = ", ".join(dict.fromkeys(low.module for low in edit.lows))
        raise BindError(
            f"{modules}: the weight is quantized, and folding would round it again; run the adapter unfolded, which "
            "is exact, or allow it: requantize=Requantize(), on the command line --requantize"
        )
    return _rounded(edit, package, requantize)


def _rounded(edit: Edit, package: Package, requantize: Requantize) -> dict[str, Array]:
    part = edit.lows[0].part
    assert part.quantized is not None  # or the edit were none of a quantized weight
    scheme, old = part.quantized.scheme, _tensors(part, package)
    base = np.array(package.weight(part), np.float32)
    start = base.copy()
    for low in edit.lows:
        source = requantize.weight(low.module, package)
        if source is not None:
            low.part.window(start)[...] = source[:, low.part.first : low.part.first + low.part.outputs]
    wanted = start.copy()
    for low in edit.lows:
        low.apply(wanted, package)
    if len(old) == 2 and old[0].dtype == np.uint8 and scheme.layout == "affine" and wanted.min() < 0:
        raise BindError(f"{edit.lows[0].module}: unsigned weights without a zero point hold no negative numbers")
    made = [
        tensor for tensor in quantize(scheme, wanted, old[0], old[2] if len(old) > 2 else None) if tensor is not None
    ]
    with np.errstate(over="ignore"):
        made = [np.asarray(new, was.dtype).reshape(was.shape) for new, was in zip(made, old, strict=True)]
    if not np.isfinite(made[1]).all():
        raise BindError(f"{edit.lows[0].module}: the folded weight needs scales beyond what {made[1].dtype} holds")
    touched = np.zeros(base.shape[0 if part.transposed else 1], bool)
    for low in edit.lows:
        touched[low.part.start : low.part.start + low.part.outputs] = True
    made = [_kept(new, was, touched, scheme, part) for new, was in zip(made, old, strict=True)]
    got = dequantize(scheme, made[0], made[1], made[2] if len(made) > 2 else None)
    for low in edit.lows:
        rounding = _rounding(low, base, start, wanted, got)
        worst = requantize.rounding.get(low.module, rounding)  # of a module in several initializers
        requantize.rounding[low.module] = max(worst, rounding, key=lambda entry: entry.of_change)
    return dict(zip(edit.tensors, made, strict=True))


def _tensors(part: WeightPart, package: Package) -> list[Array]:
    """Values, scale, and the zero point where there is one."""
    beside = () if part.quantized is None else part.quantized.tensors
    places = [part.stored, *(tensor.stored for tensor in beside)]
    return [np.asarray(package.read(place)) for place in places]


def _kept(new: Array, was: Array, touched: Array, scheme: Scheme, part: WeightPart) -> Array:
    """`new`, with what belongs to outputs that no adapter touches as it was, where outputs have scales of their
    own."""
    if scheme.layout == "blocks" and not part.transposed:
        return new  # a table's blocks lie along its outputs
    if scheme.layout == "blocks":
        rows = touched.size
        return np.where(touched[:, None], new.reshape(rows, -1), was.reshape(rows, -1)).reshape(was.shape)
    output_axis = 0 if part.transposed else 1
    in_blocks = bool(scheme.block_size)
    if scheme.axis < 0 or not was.ndim or (scheme.axis == output_axis) == in_blocks:
        return new  # scales are not outputs' own
    own = touched if was.ndim == 1 or output_axis == 1 else touched[:, None]
    return np.where(own, new, was)


def _rounding(low: Low | Changed, base: Array, start: Array, wanted: Array, got: Array) -> Rounding:
    """The change that arrived is measured from the base as it runs."""
    windows = [low.part.window(weight).astype(np.float32, copy=False) for weight in (base, start, wanted, got)]
    before, first, aim, after = windows
    change = float(np.linalg.norm(aim - first)) or 1.0
    return Rounding(
        of_weight=float(np.linalg.norm(after - aim)) / (float(np.linalg.norm(aim)) or 1.0),
        of_change=float(np.linalg.norm((after - before) - (aim - first))) / change,
    )
