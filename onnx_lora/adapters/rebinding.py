"""A bound adapter on another package than the one it was bound to: what must be the same there. It reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.adapters.adapter import NO_SCALE, BoundAdapter
from onnx_lora.adapters.bases import base_problem
from onnx_lora.adapters.explain import PROVE, explain_doubts
from onnx_lora.errors import BindError

if TYPE_CHECKING:
    from onnx_lora.package import Package
    from onnx_lora.points import Array

__all__ = ["rebind"]


def rebind(bound: BoundAdapter, package: Package, *, strict: bool = False) -> BoundAdapter:
    """The adapter as one of `package`: itself, where it was bound to that.

    Raises BindError: points, shapes, types or base weights are others there; `strict`, and it names another base.
    """
    path = bound.origin.path or None
    other_base = base_problem(bound.origin.base_model, package) if strict else None
    if other_base is not None:
        raise BindError(f"the adapter {bound.name!r} does not fit: {other_base}", path=path)
    doubts: list[str] = []
    if not package.allow_unproven:
        for doubt in explain_doubts(bound.base_digests, package):
            doubts.append(f"{doubt}; {PROVE}")
    is_same = bound.graphs == package.manifest.graphs
    if is_same and not doubts:
        return bound
    problems = [*_problems(bound, package), *doubts]
    if problems:
        if is_same:
            why = "was bound with leave to apply unproven points, and has no such leave here"
        else:
            why = f"was bound to another package than {package.name}; bind it to this one"
        raise BindError(f"the adapter {bound.name!r} {why}", path=path, problems=problems)
    coverage = replace(bound.coverage, fold_only=_fold_only(bound, package))
    return replace(bound, graphs=package.manifest.graphs, base_names=package.base_names, coverage=coverage)


def _fold_only(bound: BoundAdapter, package: Package) -> Mapping[str, str]:
    """As in `Coverage`: a package may take no scale of outputs where the other did."""
    reasons: dict[str, str] = {}
    for module, point in package.points.items():
        if point.dora_scale in bound.tensors and module not in package.dora:
            reasons[module] = NO_SCALE
    for module in bound.changes:
        reasons[module] = bound.coverage.fold_only[module]
    return reasons


def _problems(bound: BoundAdapter, package: Package) -> list[str]:
    """Every reason why the adapter's tensors are none of this package."""
    problems = _input_problems(bound.tensors, package)
    for module in bound.changes:
        if module not in package.points:
            problems.append(f"{module}: the package has no such module")
    problems.extend(_pair_problems(bound.tensors, package))
    problems.extend(_base_problems(bound, package))
    return problems


@dataclass(frozen=True)
class _Input:
    """A graph input that adapters fill, with one row; `shape` has None where any length goes."""

    dtype: str
    shape: tuple[int | None, ...]

    def takes(self, tensor: Array) -> bool:
        """Whether the tensor has the input's type and fits its shape."""
        if tensor.dtype != np.dtype(self.dtype) or tensor.ndim != len(self.shape):
            return False
        for wanted, length in zip(self.shape, tensor.shape, strict=True):
            if wanted is not None and wanted != length:
                return False
        return True


def _inputs(package: Package) -> dict[str, _Input]:
    """Every input that an adapter may fill, by its name."""
    inputs: dict[str, _Input] = {}
    for point in package.points.values():
        inputs[point.lora_a] = _Input(point.dtype, (1, point.in_features, None))
        inputs[point.lora_b] = _Input(point.dtype, (1, None, point.out_features))
        inputs[point.dora_scale] = _Input(point.dtype, (1, 1, point.out_features))
    for weight in package.replaceable.values():
        inputs[weight.name] = _Input(weight.dtype, weight.free_graph_shape)
    return inputs


def _input_problems(tensors: Mapping[str, Array], package: Package) -> list[str]:
    """Tensors that are no input of the package, or of another type or shape than its input."""
    inputs = _inputs(package)
    problems: list[str] = []
    for name, tensor in tensors.items():
        wanted = inputs.get(name)
        if wanted is None:
            problems.append(f"{name} is no input of this package")
        elif not wanted.takes(tensor):
            expected = f"{wanted.dtype} {list(wanted.shape)}"
            found = f"{tensor.dtype} {list(tensor.shape)}"
            problems.append(f"{name} must be {expected}, and is {found}")
    return problems


def _pair_problems(tensors: Mapping[str, Array], package: Package) -> list[str]:
    """Points with half a pair of factors, or factors of different rank."""
    problems: list[str] = []
    for point in package.points.values():
        a = tensors.get(point.lora_a)
        b = tensors.get(point.lora_b)
        if a is None and b is None:
            continue
        if a is None or b is None:
            problems.append(f"{point.module} must have both of lora_A and lora_B, and has one")
        elif a.shape[-1:] != b.shape[-2:-1]:
            problems.append(f"{point.module}: the ranks must agree, and the shapes are {a.shape} and {b.shape}")
    return problems


def _base_problems(bound: BoundAdapter, package: Package) -> list[str]:
    """Modules and parameters whose weights are others than those that the adapter was bound to or made from."""
    problems: list[str] = []
    for name, digest in bound.base_digests.items():
        found = package.digests.get(name)
        if found == digest:
            continue
        own = "none" if found is None else found[:12]
        problems.append(f"{name} was bound to another base: its digest is {digest[:12]}, the package's is {own}")
    for module, mark in bound.made_of.items():
        if module in package.points and package.mark(package.points[module]) != mark:
            problems.append(f"{module}: its tensors were made from the weights of another precision")
    return problems
