"""The factors of a delta against the point they enter: what must hold of them, and their arithmetic. It knows no
adapter and no package."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_lora.adapters.model import Change, Delta
from onnx_lora.points import Array, InjectionPoint

__all__ = ["column_norms", "delta_problems", "dense_b", "depends_on_weight", "in_torch_layout", "value_problems"]

# Outputs of a weight looked at together, so that W0 + A · B never stands in memory whole.
_BLOCK = 1024

_WHAT = {"linear": "a linear module", "embedding": "an embedding", "conv": "a convolution"}


def delta_problems(point: InjectionPoint, delta: Delta) -> list[str]:
    """Every reason why a delta cannot enter a point."""
    name = point.module
    if delta.in_graph_layout:
        delta = in_torch_layout(point, delta)
    if delta.kind != point.kind:
        return [f"{name}: the delta is for {_WHAT[delta.kind]}, and the package has {_WHAT[point.kind]} there"]
    names = ("lora_embedding_A", "lora_embedding_B") if point.kind == "embedding" else ("lora_A", "lora_B")
    a, b = delta.a, delta.b
    axes = len(point.input_shape) + 1
    if a.ndim != axes or b.ndim != 2:
        return [
            f"{name}: {names[0]} must have {axes} axes and {names[1]} 2, and they have shapes {a.shape} and {b.shape}"
        ]
    problems: list[str] = []
    if a.shape[1:] != point.input_shape:
        wanted, found = (
            (f"{point.in_features} inputs", str(a.shape[1]))
            if a.ndim == 2
            else (f"shape (rank, {', '.join(map(str, point.input_shape))})", str(a.shape))
        )
        problems.append(f"{name}: {names[0]} must have {wanted}, and has {found} (shape {a.shape})")
    if b.shape[0] != point.out_features:
        problems.append(
            f"{name}: {names[1]} must have {point.out_features} outputs, and has {b.shape[0]} (shape {b.shape})"
        )
    if a.shape[0] != b.shape[1] * point.groups or a.shape[0] < 1:
        groups = f" (of {point.groups} groups)" if point.groups > 1 else ""
        problems.append(
            f"{name}: the ranks must agree and be at least 1, and are {a.shape[0]} and {b.shape[1]}{groups}"
        )
    if not np.isfinite(delta.scale):
        problems.append(f"{name}: the scale must be finite, and is {delta.scale}")
    if delta.magnitude is not None:
        problems += _magnitude_problems(point, delta.magnitude)
    keys = [f"{name}.{factor}" if point.kind == "embedding" else f"{name}.{factor}.weight" for factor in names]
    return problems + value_problems(keys[0], a) + value_problems(keys[1], b)


def _magnitude_problems(point: InjectionPoint, magnitude: Array) -> list[str]:
    if point.groups > 1:
        return [f"{point.module}: DoRA on a convolution in groups has no meaning in PEFT"]
    if magnitude.shape != (point.out_features,):
        return [f"{point.module}: DoRA's magnitude must have shape ({point.out_features},), and has {magnitude.shape}"]
    return value_problems(f"{point.module}.lora_magnitude_vector", magnitude)


def value_problems(name: str, value: Array) -> list[str]:
    """Why numbers cannot be applied, or nothing."""
    if value.dtype.kind != "f":
        return [f"{name}: must be floating point, and is {value.dtype.name}"]
    bad = value.size - int(np.isfinite(value).sum())
    return [f"{name}: {bad} of {value.size} values are NaN or infinite; train or save it again"] if bad else []


def in_torch_layout(point: InjectionPoint, delta: Delta) -> Delta:
    """A delta in graph layout as PEFT keeps one for this module. What does not fit stays as it is, and is refused."""
    a, b = delta.a, delta.b
    if a.ndim == 2 and a.shape[1] == point.in_features:
        a = a.reshape(len(a), *point.input_shape)
    if b.shape == (point.out_features, len(a)) and point.groups > 1:
        outputs, rank = point.out_features // point.groups, len(a) // point.groups
        b = np.concatenate(
            [
                b[group * outputs : (group + 1) * outputs, group * rank : (group + 1) * rank]
                for group in range(point.groups)
            ]
        )
    return replace(delta, a=a, b=b, kind=point.kind, in_graph_layout=False)


def dense_b(point: InjectionPoint, delta: Delta) -> Array:
    """B `[out, rank]`; of a convolution in groups, each group's part in its block of a diagonal."""
    if point.groups == 1 or delta.in_graph_layout:
        return delta.b
    outputs, rank = point.out_features // point.groups, delta.b.shape[1]
    dense = np.zeros((point.out_features, rank * point.groups), delta.b.dtype)
    for group in range(point.groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        dense[rows, group * rank : (group + 1) * rank] = delta.b[rows]
    return dense


def depends_on_weight(change: Change, delta: Delta, shape: tuple[int, ...]) -> bool:
    """Whether a change's factors would be others for another weight of its shape."""
    other = change.delta(np.broadcast_to(np.float32(0), shape))
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
