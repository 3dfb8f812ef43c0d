"""Whatever a caller gives as an adapter, bound to a package. It knows no session and no graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias, Union

import numpy as np

from onnx_lora.adapters import Adapter, BoundAdapter, bind, read_adapter
from onnx_lora.adapters.compose import blended
from onnx_lora.errors import BindError, SelectionError
from onnx_lora.package import Package
from onnx_lora.points import Array, Replaceable

__all__ = ["AnyAdapter", "AnyPackage", "Mixture", "as_bound", "mixed", "opened"]

AnyAdapter: TypeAlias = Union[str, "os.PathLike[str]", Adapter, BoundAdapter]
AnyPackage: TypeAlias = Union[str, "os.PathLike[str]", Package]

# Several adapters and their weights. Adapters already read cannot be keys: they go in pairs.
Mixture: TypeAlias = Mapping[AnyAdapter, float] | Sequence[tuple[AnyAdapter, float]]


def opened(package: AnyPackage) -> Package:
    return package if isinstance(package, Package) else Package.open(package)


def as_bound(adapter: AnyAdapter, package: Package, *, name: str | None = None) -> BoundAdapter:
    """Read and bind what is not yet; what is, is checked to be bound to an equal package.

    Raises AdapterError: it cannot be read, or does not fit.
    """
    if isinstance(adapter, BoundAdapter):
        _check(adapter, package)
        return adapter
    if isinstance(adapter, Adapter):
        return bind(adapter, package)
    if isinstance(adapter, (str, os.PathLike)):
        return bind(read_adapter(adapter, name=name), package)
    raise SelectionError(f"an adapter must be a path, an Adapter or a BoundAdapter, and is a {type(adapter).__name__}")


def mixed(adapter: AnyAdapter | Mixture, package: Package) -> BoundAdapter:
    """One adapter, or several blended into one.

    Raises AdapterError: one cannot be read, or does not fit. SelectionError: they cannot be blended.
    """
    if isinstance(adapter, (str, os.PathLike, Adapter, BoundAdapter)):
        return as_bound(adapter, package)
    pairs = list(adapter.items()) if isinstance(adapter, Mapping) else adapter
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise SelectionError(
            "a blend must be a mapping from adapters to weights, or a list of (adapter, weight) pairs, "
            f"and is a {type(adapter).__name__}"
        )
    if not pairs:
        raise SelectionError("a blend must name an adapter, and is empty")
    return blended([(as_bound(part, package), weight) for part, weight in pairs], name="blend")


def _check(bound: BoundAdapter, package: Package) -> None:
    """That an adapter bound elsewhere was bound to the same points over the same base."""
    shapes = _shapes(package)
    problems = [
        f"{name} is no input of this package"
        if name not in shapes
        else f"{name} must be {shapes[name][0]} {list(shapes[name][1])}, and is {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in bound.tensors.items()
        if name not in shapes or not _is(tensor, *shapes[name])
    ]
    problems += _pair_problems(bound.tensors, package) + _base_problems(bound, package)
    if problems:
        raise BindError(
            f"the adapter {bound.name!r} was bound to another package than {package.name}; bind it to this one",
            path=bound.origin.path or None,
            problems=problems,
        )


def _shapes(package: Package) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Type and shape of every adapter input, with one row; None where any length goes."""
    shapes: dict[str, tuple[str, tuple[int | None, ...]]] = {}
    for point in package.points.values():
        shapes[point.lora_a] = point.dtype, (1, point.in_features, None)
        shapes[point.lora_b] = point.dtype, (1, None, point.out_features)
        shapes[point.dora_scale] = point.dtype, (1, 1, point.out_features)
    for weight in package.replaceable.values():
        shape = _input_shape(weight)
        shapes[weight.name] = weight.dtype, weight.free(shape)
    return shapes


def _pair_problems(tensors: Mapping[str, Array], package: Package) -> list[str]:
    problems = []
    for point in package.points.values():
        a, b = tensors.get(point.lora_a), tensors.get(point.lora_b)
        if (a is None) != (b is None):
            problems.append(f"{point.module} must have both of lora_A and lora_B, and has one")
        elif a is not None and b is not None and a.shape[-1:] != b.shape[-2:-1]:
            problems.append(f"{point.module}: the ranks must agree, and the shapes are {a.shape} and {b.shape}")
    return problems


def _base_problems(bound: BoundAdapter, package: Package) -> list[str]:
    digests = {point.module: point.sha256 for point in package.points.values()}
    digests |= {weight.name: weight.sha256 for weight in package.replaceable.values()}
    return [
        f"{name} was bound to another base: its digest is {digest[:12]}, the package's is {digests[name][:12]}"
        for name, digest in bound.base_digests.items()
        if digests.get(name, digest) != digest
    ]


def _input_shape(weight: Replaceable) -> tuple[int, ...]:
    """Of a replaceable weight's graph input with one row."""
    if weight.role == "linear_bias":
        return (1, 1, *weight.shape)
    if weight.role == "linear_weight":
        return (1, *(weight.shape if weight.in_out else reversed(weight.shape)))
    return weight.shape


def _is(tensor: Array, dtype: str, shape: Sequence[int | None]) -> bool:
    return (
        tensor.dtype == np.dtype(dtype)
        and tensor.ndim == len(shape)
        and all(dim is None or dim == length for dim, length in zip(shape, tensor.shape, strict=True))
    )
