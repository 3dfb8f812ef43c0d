"""The factors of a delta against the point they enter: what must hold of them, and their arithmetic. It knows no
adapter and no package."""

from __future__ import annotations

import numpy as np

from onnx_lora.adapters.adapter import Change, Delta, MatrixDelta
from onnx_lora.points import Array, InjectionPoint

__all__ = ["as_matrices", "as_torch", "column_norms", "delta_problems", "depends_on_weight", "value_problems"]

# Outputs of a weight looked at together, so that W0 + A · B never stands in memory whole.
_BLOCK = 1024


def delta_problems(point: InjectionPoint, delta: Delta | MatrixDelta) -> list[str]:
    """Every reason why a delta cannot enter a point."""
    name, kind = point.module, point.kind
    torch_delta = as_torch(point, delta) if isinstance(delta, MatrixDelta) else delta
    if torch_delta.kind.name != kind.name:
        return [f"{name}: the delta is for {torch_delta.kind.noun}, and the package has {kind.noun} there"]
    a_name, b_name = kind.factor_names
    a, b = torch_delta.a, torch_delta.b
    axes = len(point.factor_shape) + 1
    if a.ndim != axes or b.ndim != 2:
        return [f"{name}: {a_name} must have {axes} axes and {b_name} 2, and they have shapes {a.shape} and {b.shape}"]
    problems: list[str] = []
    if a.shape[1:] != point.factor_shape:
        if a.ndim == 2:
            wanted, found = f"{point.in_features} inputs", str(a.shape[1])
        else:
            wanted, found = f"shape (rank, {', '.join(map(str, point.factor_shape))})", str(a.shape)
        problems.append(f"{name}: {a_name} must have {wanted}, and has {found} (shape {a.shape})")
    if b.shape[0] != point.out_features:
        problems.append(
            f"{name}: {b_name} must have {point.out_features} outputs, and has {b.shape[0]} (shape {b.shape})"
        )
    if a.shape[0] != kind.dense_rank(b.shape[1]) or a.shape[0] < 1:
        groups = f" (of {kind.dense_rank(1)} groups)" if kind.dense_rank(1) > 1 else ""
        problems.append(
            f"{name}: the ranks must agree and be at least 1, and are {a.shape[0]} and {b.shape[1]}{groups}"
        )
    if not np.isfinite(torch_delta.scale):
        problems.append(f"{name}: the scale must be finite, and is {torch_delta.scale}")
    if torch_delta.magnitude is not None:
        problems += _magnitude_problems(point, torch_delta.magnitude)
    return problems + value_problems(point.factor_keys[0], a) + value_problems(point.factor_keys[1], b)


def _magnitude_problems(point: InjectionPoint, magnitude: Array) -> list[str]:
    if not point.kind.foldable:
        return [f"{point.module}: DoRA on {point.kind.noun} has no meaning in PEFT"]
    if magnitude.shape != (point.out_features,):
        return [f"{point.module}: DoRA's magnitude must have shape ({point.out_features},), and has {magnitude.shape}"]
    return value_problems(f"{point.module}.lora_magnitude_vector", magnitude)


def value_problems(name: str, value: Array) -> list[str]:
    """Why numbers cannot be applied, or nothing."""
    if value.dtype.kind != "f":
        return [f"{name}: must be floating point, and is {value.dtype.name}"]
    bad = value.size - int(np.isfinite(value).sum())
    return [f"{name}: {bad} of {value.size} values are NaN or infinite; train or save it again"] if bad else []


def as_torch(point: InjectionPoint, delta: MatrixDelta) -> Delta:
    """Factors as PEFT keeps them for this module. What does not fit stays as it is, and `delta_problems` refuses it."""
    a, b = delta.a, delta.b
    if a.ndim == 2 and a.shape[1] == point.in_features:
        a = a.reshape(len(a), *point.factor_shape)
    if b.shape == (point.out_features, len(a)):
        b = point.kind.compact_b(b, point.out_features)
    return Delta(a, b, delta.scale, point.kind, delta.magnitude)


def as_matrices(point: InjectionPoint, delta: Delta | MatrixDelta) -> MatrixDelta:
    """Factors, of which `delta_problems` found none wrong, as matrices: A `[r, in]`, B `[out, r]`."""
    if isinstance(delta, MatrixDelta):
        return delta
    return MatrixDelta(delta.a.reshape(len(delta.a), -1), point.kind.dense_b(delta.b), delta.scale, delta.magnitude)


def depends_on_weight(change: Change, delta: MatrixDelta, shape: tuple[int, ...]) -> bool:
    """Whether a change's factors would be others for another weight of its shape."""
    other = change.as_factors(np.broadcast_to(np.float32(0), shape))
    return other is None or not (np.array_equal(other.a, delta.a) and np.array_equal(other.b, delta.b))


def column_norms(weight: Array, a: Array, b: Array) -> Array:
    """‖W0 + A · B‖ for each output, in float64; `weight` `[in, out]`, `a` `[in, rank]`, `b` `[rank, out]`.

    DoRA (Liu et al. 2024), equation 5.
    """
    norms = np.empty(weight.shape[1])
    wide = np.promote_types(weight.dtype, np.float32)
    for begin in range(0, weight.shape[1], _BLOCK):
        outputs = slice(begin, begin + _BLOCK)
        total = weight[:, outputs].astype(wide) + a.astype(wide) @ b[:, outputs].astype(wide)
        norms[outputs] = np.sqrt(np.einsum("io,io->o", total, total, dtype=np.float64))
    return norms
