"""A delta or another change, and the point where it enters a graph: the checks of its tensors, and the arithmetic of
factors. It knows no adapter and no package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.adapters.adapter import Change, Delta, HasTensors, MatrixDelta
from onnx_lora.adapters.problems import finite_problem, value_problems
from onnx_lora.errors import PluginError

if TYPE_CHECKING:
    from onnx_lora.points import Array, InjectionPoint

__all__ = [
    "apply_change",
    "as_matrices",
    "as_torch",
    "change_as_factors",
    "change_problems",
    "column_norms",
    "delta_problems",
    "depends_on_weight",
    "finite_problems",
]

# Outputs of a weight whose norms are computed together, so that W0 + A · B never stands in memory whole.
_BLOCK = 1024


def delta_problems(point: InjectionPoint, delta: Delta | MatrixDelta) -> list[str]:
    """Every reason why a delta cannot enter a point."""
    torch_delta = as_torch(point, delta) if isinstance(delta, MatrixDelta) else delta
    delta_kind, point_kind = torch_delta.kind, point.kind
    if delta_kind.name != point_kind.name:
        return [f"{point.module}: the delta is for {delta_kind.noun}, and the package has {point_kind.noun} there"]
    a, b = torch_delta.a, torch_delta.b
    axes_problem = _axes_problem(point, a, b)
    if axes_problem is not None:
        return [axes_problem]
    problems = _size_problems(point, a, b)
    problems.extend(_rank_problems(point, a, b))
    if not np.isfinite(torch_delta.scale):
        problems.append(f"{point.module}: the scale must be finite, and is {torch_delta.scale}")
    if torch_delta.magnitude is not None:
        problems.extend(_magnitude_problems(point, torch_delta.magnitude))
    a_key, b_key = point.factor_keys
    problems.extend(value_problems(a_key, a))
    problems.extend(value_problems(b_key, b))
    return problems


def _axes_problem(point: InjectionPoint, a: Array, b: Array) -> str | None:
    """Where the factors have another number of axes than those of the point's kind."""
    a_name, b_name = point.kind.factor_names
    axes = len(point.factor_shape) + 1
    if a.ndim == axes and b.ndim == 2:
        return None
    return (
        f"{point.module}: {a_name} must have {axes} axes and {b_name} 2, and they have shapes {a.shape} and {b.shape}"
    )


def _size_problems(point: InjectionPoint, a: Array, b: Array) -> list[str]:
    """Where the factors' inputs and outputs are not the point's."""
    a_name, b_name = point.kind.factor_names
    problems: list[str] = []
    if a.shape[1:] != point.factor_shape:
        if a.ndim == 2:
            wanted = f"{point.in_features} inputs"
            found = str(a.shape[1])
        else:
            sizes = ", ".join(str(size) for size in point.factor_shape)
            wanted = f"shape (rank, {sizes})"
            found = str(a.shape)
        problems.append(f"{point.module}: {a_name} must have {wanted}, and has {found} (shape {a.shape})")
    outputs = b.shape[0]
    if outputs != point.out_features:
        problems.append(
            f"{point.module}: {b_name} must have {point.out_features} outputs, and has {outputs} (shape {b.shape})"
        )
    return problems


def _rank_problems(point: InjectionPoint, a: Array, b: Array) -> list[str]:
    """Where the factors' ranks disagree, or are zero. In a convolution in groups, B has the rank of one group."""
    a_rank = a.shape[0]
    b_rank = b.shape[1]
    if a_rank == point.kind.dense_rank(b_rank) and a_rank >= 1:
        return []
    groups = point.kind.dense_rank(1)
    of_groups = f" (of {groups} groups)" if groups > 1 else ""
    return [f"{point.module}: the ranks must agree and be at least 1, and are {a_rank} and {b_rank}{of_groups}"]


def _magnitude_problems(point: InjectionPoint, magnitude: Array) -> list[str]:
    if not point.kind.foldable:
        return [f"{point.module}: DoRA on {point.kind.noun} has no meaning in PEFT"]
    if magnitude.shape != (point.out_features,):
        return [f"{point.module}: DoRA's magnitude must have shape ({point.out_features},), and has {magnitude.shape}"]
    return value_problems(f"{point.module}.lora_magnitude_vector", magnitude)


def change_problems(point: InjectionPoint, change: Change) -> list[str]:
    """Every reason why a change cannot be applied to the weight of a point."""
    misfit = change.explain_misfit(point.torch_shape, point.kind)
    if misfit is not None:
        return [f"{point.module}: {misfit}"]
    if not point.kind.foldable:
        return [f"{point.module}: {change.method} on {point.kind.noun} is not applied"]
    return finite_problems(point.module, change)


def finite_problems(name: str, change: Change) -> list[str]:
    """Where the tensors that a change was made of are not finite. Whole numbers (indices) always are.

    name: of the module or parameter that it changes.
    """
    problems: list[str] = []
    for tensor, values in _tensors_of(change).items():
        problem = finite_problem(f"{name}, {tensor}", values)
        if problem is not None:
            problems.append(problem)
    return problems


def _tensors_of(change: Change) -> Mapping[str, Array]:
    """The tensors that a change was made of. Their names are the file's where the change gives them, and else those of
    the change's own fields."""
    if isinstance(change, HasTensors):
        return change.tensors()
    return dict(_arrays_in(change, change.method))


def _arrays_in(value: object, name: str) -> Iterator[tuple[str, Array]]:
    """The arrays in the fields of a dataclass, and in tuples and lists there, with names for messages."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from _arrays_in(entry, f"{name}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _arrays_in(getattr(value, field.name), field.name)


def as_torch(point: InjectionPoint, delta: MatrixDelta) -> Delta:
    """A delta as PEFT keeps it for this module. A factor that does not fit stays as it is, for `delta_problems`."""
    a, b = delta.a, delta.b
    if a.ndim == 2 and a.shape[1] == point.in_features:
        a = a.reshape(len(a), *point.factor_shape)
    if b.shape == (point.out_features, len(a)):
        b = point.kind.compact_b(b, point.out_features)
    return Delta(a, b, delta.scale, point.kind, delta.magnitude)


def as_matrices(point: InjectionPoint, delta: Delta | MatrixDelta) -> MatrixDelta:
    """A delta in which `delta_problems` found nothing wrong, as matrices A `[r, in]` and B `[out, r]`."""
    if isinstance(delta, MatrixDelta):
        return delta
    a = delta.a.reshape(delta.rank, -1)
    b = point.kind.dense_b(delta.b)
    return MatrixDelta(a, b, delta.scale, delta.magnitude)


def change_as_factors(change: Change, point: InjectionPoint, weight: Array) -> MatrixDelta | None:
    """A change in which `change_problems` found nothing wrong, as a pair of factors; None: it is no such pair.

    weight: W0 of the point `[in, out]`, as the package has it.
    """
    wide = np.promote_types(weight.dtype, np.float32)
    torch_weight = point.to_torch(weight)
    return change.as_factors(torch_weight.astype(wide, copy=False))


def apply_change(change: Change, weight: Array) -> Array:
    """The weight that a change makes of `weight`, both in PyTorch's shape, in float32 or wider.

    Raises PluginError: it is of another shape or type. NumPy would stretch such a weight to the one that it replaces.
    Only a method of another distribution can do that: ours are tested.
    """
    changed = change.apply_to(weight)
    if not isinstance(changed, np.ndarray) or changed.shape != weight.shape or changed.dtype.kind != "f":
        found = type(changed).__name__
        if isinstance(changed, np.ndarray):
            found = f"{changed.dtype} of shape {changed.shape}"
        raise PluginError(
            f"the method {change.method!r} must make floating point of shape {weight.shape} of the weight, and makes "
            f"{found}; correct the distribution that brought it, or uninstall it"
        )
    return changed


def depends_on_weight(change: Change, delta: MatrixDelta, shape: tuple[int, ...]) -> bool:
    """Whether a change's factors would be others for another weight of its shape."""
    zeros = np.broadcast_to(np.float32(0), shape)
    of_zeros = change.as_factors(zeros)
    if of_zeros is None:
        return True
    is_same = np.array_equal(of_zeros.a, delta.a) and np.array_equal(of_zeros.b, delta.b)
    return not is_same


def column_norms(weight: Array, a: Array, b: Array) -> Array:
    """‖W0 + A · B‖ for each output, in float64; `weight` `[in, out]`, `a` `[in, rank]`, `b` `[rank, out]`.

    DoRA (Liu et al. 2024), equation 5.
    """
    count = weight.shape[1]
    norms = np.empty(count)
    wide = np.promote_types(weight.dtype, np.float32)
    wide_a = a.astype(wide)
    for begin in range(0, count, _BLOCK):
        outputs = slice(begin, begin + _BLOCK)
        change = wide_a @ b[:, outputs].astype(wide)
        total = weight[:, outputs].astype(wide) + change
        squares = np.einsum("io,io->o", total, total, dtype=np.float64)
        norms[outputs] = np.sqrt(squares)
    return norms
