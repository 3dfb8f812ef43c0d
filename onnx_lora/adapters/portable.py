"""An adapter as foreign formats can hold one: pairs of factors as PyTorch keeps them, and whole weights by torch
parameter name. It knows no foreign format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.adapters.adapter import (
    Adapter,
    BoundAdapter,
    Change,
    Delta,
    MatrixDelta,
    NeedsConfig,
    Origin,
    PortableAdapter,
    Replacement,
)
from onnx_lora.adapters.align import align
from onnx_lora.adapters.binding import bind
from onnx_lora.adapters.factors import as_torch, change_as_factors
from onnx_lora.errors import InputError, UnsupportedAdapterError
from onnx_lora.kinds import LINEAR

if TYPE_CHECKING:
    from onnx_lora.package import Package
    from onnx_lora.points import InjectionPoint

__all__ = ["make_portable"]

_GIVE_PACKAGE = "give the package that it is for (`package=...`)"


def make_portable(
    adapter: Adapter | BoundAdapter, package: Package | None, *, laid_out: bool = False
) -> PortableAdapter:
    """The adapter tied to no package, with a pair of factors for every change that is one.

    With a package the adapter is aligned with it and checked against it. Without one, an adapter is refused if only a
    package could say what it means.

    laid_out: the adapter is of a format that holds the inputs of one package's graphs.

    Raises UnsupportedAdapterError: a change is no pair of factors, or only a package could say whether it is one.
    BindError: the adapter does not fit `package`. InputError: a bound adapter, or a file of one, and no package.
    """
    if package is None:
        if isinstance(adapter, BoundAdapter) or laid_out:
            raise InputError(
                "a bound adapter, and a file of one, need the package that it is bound to (`package=...`)",
                path=adapter.origin.path,
            )
        return _without_package(adapter)
    if isinstance(adapter, BoundAdapter) or laid_out:
        return _from_bound(bind(adapter, package), package)
    return _from_adapter(adapter, package)


def _without_package(adapter: Adapter) -> PortableAdapter:
    """From an adapter that needs no package to be understood."""
    problems: list[str] = []
    deltas: dict[str, Delta] = {}
    if adapter.flat_names:
        problems.append(f"its names have `_` for `.`, and only a package says which modules they mean; {_GIVE_PACKAGE}")
    for module, delta in adapter.deltas.items():
        if isinstance(delta, Delta):
            deltas[module] = delta
        else:
            problems.append(
                f"{module}: only a package says whether it is a linear module, a convolution or an embedding; "
                f"{_GIVE_PACKAGE}"
            )
    for module, change in adapter.changes.items():
        problems.append(f"{module}: {_need_of_package(change)}")
    return _make_checked(adapter.name, adapter.origin, deltas, adapter.replacements, problems)


def _need_of_package(change: Change) -> str:
    """Why a change cannot be written without a package."""
    if isinstance(change, NeedsConfig):
        return f"{change.explain_misfit((), LINEAR)}, and give that package (`package=...`)"
    return f"whether {change.method} is a pair of factors depends on the base's weights; {_GIVE_PACKAGE}"


def _from_adapter(adapter: Adapter, package: Package) -> PortableAdapter:
    """From the adapter's own factors, unrounded. The package says which modules they mean, and which of the other
    changes are pairs of factors."""
    aligned = align(adapter, package)
    bound = bind(aligned, package)
    problems: list[str] = []
    deltas: dict[str, Delta] = {}
    for module, delta in aligned.adapter.deltas.items():
        _put_delta(package.points[module], delta, deltas, problems)
    for module, change in aligned.adapter.changes.items():
        factors = _factors_of(module, change, package)
        if factors is None:
            problems.append(
                f"{module}: {change.method} changes the weight in a way that no pair of factors expresses; fold the "
                "adapter into the model instead (`onnx-lora fold`)"
            )
        else:
            _put_delta(package.points[module], factors, deltas, problems)
    # PEFT saves the base's own embeddings beside a change of them; those replace nothing.
    replacements: dict[str, Replacement] = {}
    for name, replacement in aligned.adapter.replacements.items():
        if name in bound.coverage.replaced:
            replacements[name] = replacement
    return _make_checked(adapter.name, adapter.origin, deltas, replacements, problems)


def _factors_of(module: str, change: Change, package: Package) -> MatrixDelta | None:
    """The pair of factors that a change is for this base's weight; None: it is none, or changes a bare parameter."""
    point = package.points.get(module)
    return None if point is None else change_as_factors(change, point, package.module_weight(point))


def _from_bound(bound: BoundAdapter, package: Package) -> PortableAdapter:
    """From the tensors of graph inputs. Their B has the scale in it, so that every scale is 1."""
    problems = [f"{module}: {bound.coverage.fold_only.get(module, 'only folds')}" for module in bound.changes]
    deltas: dict[str, Delta] = {}
    for module in bound.coverage.applied:
        point = package.points[module]
        if point.lora_a in bound.tensors:
            a = bound.tensors[point.lora_a][0].T
            b = bound.tensors[point.lora_b][0].T
            delta = MatrixDelta(a, b, 1.0, bound.magnitudes.get(module))
            _put_delta(point, delta, deltas, problems)
        if point.dora_scale in bound.tensors and module not in bound.magnitudes:
            problems.append(f"{module}: has a factor for each output, which no pair of factors expresses")
    replacements: dict[str, Replacement] = {}
    for name in bound.coverage.replaced:
        replacements[name] = Replacement(package.replaceable[name].to_torch(bound.tensors[name]))
    return _make_checked(bound.name, bound.origin, deltas, replacements, problems)


def _put_delta(
    point: InjectionPoint, delta: Delta | MatrixDelta, deltas: dict[str, Delta], problems: list[str]
) -> None:
    """Put the factors into `deltas` as PyTorch keeps them for this point; or say in `problems` why they are none."""
    if isinstance(delta, Delta):
        deltas[point.module] = delta
        return
    if delta.output_scale is not None and delta.magnitude is None:
        problems.append(f"{point.module}: has a factor for each output, and no magnitude of DoRA to compute it from")
        return
    torch_delta = as_torch(point, delta)
    if not np.array_equal(point.kind.dense_b(torch_delta.b), delta.b):
        problems.append(f"{point.module}: its B reaches across the groups of {point.kind.noun}, and PEFT's cannot")
        return
    deltas[point.module] = torch_delta


def _make_checked(
    name: str,
    origin: Origin,
    deltas: Mapping[str, Delta],
    replacements: Mapping[str, Replacement],
    problems: list[str],
) -> PortableAdapter:
    """Raises UnsupportedAdapterError: there are problems."""
    if problems:
        raise UnsupportedAdapterError(
            f"adapter {name!r} cannot be written in this format", path=origin.path, problems=problems
        )
    return PortableAdapter(name, deltas, replacements, origin)
