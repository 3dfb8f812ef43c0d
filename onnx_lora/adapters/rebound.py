"""A bound adapter on another package than the one it was bound to: what must be the same there. It reads no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_lora.adapters.adapter import NO_SCALE, BoundAdapter
from onnx_lora.adapters.explain import PROVE, explain_doubts
from onnx_lora.errors import BindError
from onnx_lora.package import Package
from onnx_lora.points import Array

__all__ = ["rebound"]


def rebound(bound: BoundAdapter, package: Package) -> BoundAdapter:
    """The adapter as one of `package`: itself, where it was bound to that.

    Raises BindError: points, shapes, types or base weights are others there.
    """
    doubts = explain_doubts(bound.base_digests, package)
    refused = [] if package.allow_unproven else [f"{doubt}; {PROVE}" for doubt in doubts]
    if bound.graphs == package.manifest.graphs and not refused:
        return bound
    shapes = _shapes(package)
    problems = [
        f"{name} is no input of this package"
        if name not in shapes
        else f"{name} must be {shapes[name][0]} {list(shapes[name][1])}, and is {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in bound.tensors.items()
        if name not in shapes or not _is(tensor, *shapes[name])
    ]
    problems += [
        f"{module}: the package has no such module" for module in bound.changes if module not in package.points
    ]
    problems += _pair_problems(bound.tensors, package) + _base_problems(bound, package)
    problems += refused
    if problems:
        raise BindError(
            f"the adapter {bound.name!r} {_why(bound, package)}",
            path=bound.origin.path or None,
            problems=problems,
        )
    scaled = [point.module for point in package.points.values() if point.dora_scale in bound.tensors]
    fold_only = {module: NO_SCALE for module in scaled if module not in package.dora}
    fold_only |= {module: bound.coverage.fold_only[module] for module in bound.changes}
    coverage = replace(bound.coverage, fold_only=fold_only)
    return replace(bound, graphs=package.manifest.graphs, base_names=package.base_names, coverage=coverage)


def _why(bound: BoundAdapter, package: Package) -> str:
    if bound.graphs == package.manifest.graphs:
        return "was bound with leave to unproven points, and has none here"
    return f"was bound to another package than {package.name}; bind it to this one"


def _shapes(package: Package) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Type and shape of every adapter input, with one row; None where any length goes."""
    shapes: dict[str, tuple[str, tuple[int | None, ...]]] = {}
    for point in package.points.values():
        shapes[point.lora_a] = point.dtype, (1, point.in_features, None)
        shapes[point.lora_b] = point.dtype, (1, None, point.out_features)
        shapes[point.dora_scale] = point.dtype, (1, 1, point.out_features)
    for weight in package.replaceable.values():
        shapes[weight.name] = weight.dtype, weight.free_graph_shape
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
    problems = [
        f"{name} was bound to another base: its digest is {digest[:12]}, the package's is "
        f"{digests.get(name, 'that of no module')[:12]}"
        for name, digest in bound.base_digests.items()
        if digests.get(name) != digest
    ]
    return problems + [
        f"{module}: its tensors were made from the weights of another precision"
        for module, mark in bound.made_of.items()
        if module in package.points and package.mark(package.points[module]) != mark
    ]


def _is(tensor: Array, dtype: str, shape: Sequence[int | None]) -> bool:
    return (
        tensor.dtype == np.dtype(dtype)
        and tensor.ndim == len(shape)
        and all(dim is None or dim == length for dim, length in zip(shape, tensor.shape, strict=True))
    )
