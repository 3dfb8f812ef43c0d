"""The weights of a package's points, as a checkpoint for another graph of the same base."""

from __future__ import annotations

from functools import partial

from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind, find_kind
from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeight, CheckpointWeights
from onnx_lora.kinds import Linear
from onnx_lora.package import Package
from onnx_lora.points import Array, InjectionPoint, WholeWeight
from onnx_lora.roles import LinearWeight

__all__ = ["read_package_weights"]


def read_package_weights(package: Package) -> CheckpointWeights:
    """The weights of a package's points, and those of linear modules that it lets adapters replace."""
    weights: list[CheckpointWeight] = []
    for point in package.points.values():
        weights.append(_weight_of_point(package, point))
    for whole in package.replaceable.values():
        if isinstance(whole.role, LinearWeight) and whole.module not in package.points:
            weights.append(_whole_weight(package, whole))
    modules = frozenset(weight.module for weight in weights)
    # Not None: the modules are known to be linear, whatever else reads an equal weight.
    return CheckpointWeights(tuple(weights), modules, heads=frozenset())


def _weight_of_point(package: Package, point: InjectionPoint) -> CheckpointWeight:
    kind = find_kind(type(point.kind))
    inputs = point.kind.weight_inputs(point.in_features)
    shape = (point.out_features, inputs)
    if _is_kept_in_out(kind):
        shape = (inputs, point.out_features)
    read = partial(_read_point, package, point)
    return CheckpointWeight(point.module, shape, read, (kind,), point.bias)


def _whole_weight(package: Package, weight: WholeWeight) -> CheckpointWeight:
    _, inputs, outputs = weight.graph_shape
    read = partial(_read_whole, package, weight)
    return CheckpointWeight(weight.module, (outputs, inputs), read, (find_kind(Linear),))


def _is_kept_in_out(kind: GraphKind) -> bool:
    """Whether torch keeps every weight of a kind `[in, out]`."""
    return all(kind.layouts)


def _read_point(package: Package, point: InjectionPoint, part: tuple[slice, slice]) -> Array:
    """A part of a point's weight, in the layout that torch keeps it in."""
    values: Array = package.module_weight(point)
    if not _is_kept_in_out(find_kind(type(point.kind))):
        values = values.T
    return values[part]


def _read_whole(package: Package, weight: WholeWeight, part: tuple[slice, slice]) -> Array:
    """A part of a linear module's weight `[out, in]`; its input's default is `[1, in, out]`."""
    values: Array = package.default(weight)[0].T
    return values[part]
