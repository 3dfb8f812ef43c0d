"""An adapter as foreign formats can hold one: pairs of factors in PEFT's orientation and shapes, and whole weights by
torch parameter name. It knows no format."""

from __future__ import annotations

import numpy as np

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, Change, Delta, MatrixDelta, PortableAdapter, Replacement
from onnx_lora.adapters.factors import as_torch
from onnx_lora.adapters.formats.gguf.reader import InterleavedRows
from onnx_lora.adapters.names import resolved
from onnx_lora.adapters.tied import with_tied
from onnx_lora.errors import UnsupportedAdapterError
from onnx_lora.kinds import LINEAR
from onnx_lora.package import Package
from onnx_lora.points import InjectionPoint

__all__ = ["plain", "unbound"]

_GIVE = "give the package that it is for (`--package`)"


def plain(adapter: Adapter, package: Package | None) -> PortableAdapter:
    """The adapter with every delta in torch's layout, and changes as factors where this package's weights make them so.

    Raises UnsupportedAdapterError: what only a package can tell, and there is none; a change that is no pair of
    factors. BindError: ambiguous names.
    """
    problems: list[str] = []
    if package is not None:
        adapter, problems = with_tied(resolved(adapter, package), package)
    if adapter.flat_names:
        problems.append(f"its names have `_` for `.`, and which modules they mean only a package tells; {_GIVE}")
    deltas: dict[str, Delta] = {}
    for module, delta in adapter.deltas.items():
        point = package.points.get(module) if package is not None else None
        own = _as_torch(module, delta, point, problems)
        if own is not None:
            deltas[module] = own
    for module, change in adapter.changes.items():
        made = _as_delta(module, change, package, problems)
        if made is not None:
            deltas[module] = made
    if problems:
        raise UnsupportedAdapterError(
            f"adapter {adapter.name!r} cannot be written in this format", path=adapter.origin.path, problems=problems
        )
    return PortableAdapter(adapter.name, deltas, adapter.replacements, adapter.origin)


def _as_torch(
    module: str, delta: Delta | MatrixDelta, point: InjectionPoint | None, problems: list[str]
) -> Delta | None:
    """Factors as PyTorch keeps them; None where a problem says why not."""
    if isinstance(delta, Delta):
        return delta
    if point is None:
        problems.append(
            f"{module}: whether it is a linear module, a convolution or an embedding only a package tells; {_GIVE}"
        )
        return None
    if delta.output_scale is not None and delta.magnitude is None:
        problems.append(f"{module}: has a factor for each output, and no magnitude of DoRA")
        return None
    made = as_torch(point, delta)
    if not np.array_equal(point.kind.dense_b(made.b), delta.b):
        problems.append(f"{module}: its B reaches across the groups of {point.kind.noun}, and PEFT's cannot")
        return None
    return made


def _as_delta(module: str, change: Change, package: Package | None, problems: list[str]) -> Delta | None:
    point = package.points.get(module) if package is not None else None
    if package is None or point is None:
        if isinstance(change, InterleavedRows):
            problems.append(f"{module}: {change.explain_misfit((), LINEAR)}, and give that package (`--package`)")
        else:
            problems.append(f"{module}: {change.method} becomes factors, if at all, with the base's weights; {_GIVE}")
        return None
    wrong = change.explain_misfit(point.torch_shape, point.kind)
    weight = point.to_torch(package.module_weight(point))
    made = None if wrong else change.as_factors(weight.astype(np.promote_types(weight.dtype, np.float32), copy=False))
    if made is None:
        why = wrong or f"{change.method} changes the weight in a way that no pair of factors expresses"
        problems.append(f"{module}: {why}; fold the adapter into the model instead (`onnx-lora fold`)")
        return None
    return _as_torch(module, made, point, problems)


def unbound(bound: BoundAdapter, package: Package) -> PortableAdapter:
    """A bound adapter, or a blend, as one that is tied to no graph; every scale is 1.

    Raises UnsupportedAdapterError: a change that is no pair of factors.
    """
    problems = [f"{module}: {bound.coverage.fold_only.get(module, 'only folds')}" for module in bound.changes]
    deltas: dict[str, Delta] = {}
    for module in bound.coverage.applied:
        point = package.points[module]
        if point.lora_a in bound.tensors:
            a, b = bound.tensors[point.lora_a][0].T, bound.tensors[point.lora_b][0].T
            made = _as_torch(module, MatrixDelta(a, b, 1.0, bound.magnitudes.get(module)), point, problems)
            if made is not None:
                deltas[module] = made
        if point.dora_scale in bound.tensors and module not in bound.magnitudes:
            problems.append(f"{module}: has a factor for each output, and no pair of factors expresses that")
    whole = {
        name: Replacement(package.replaceable[name].to_torch(bound.tensors[name])) for name in bound.coverage.replaced
    }
    if problems:
        raise UnsupportedAdapterError(
            f"adapter {bound.name!r} cannot be written in this format", path=bound.origin.path, problems=problems
        )
    return PortableAdapter(bound.name, deltas, whole, bound.origin)
