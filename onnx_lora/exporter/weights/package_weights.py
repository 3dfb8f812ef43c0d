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
    for name, point in package.points.items():
        kind = find_kind(type(point.kind))
        inputs, outputs = point.kind.weight_inputs(point.in_features), point.out_features
        shape = (inputs, outputs) if _is_kept_in_out(kind) else (outputs, inputs)
        weights.append(CheckpointWeight(name, shape, partial(_read_point, package, point), (kind,), point.bias))
    for weight in package.replaceable.values():
        if isinstance(weight.role, LinearWeight) and weight.module not in package.points:
            _, inputs, outputs = weight.graph_shape
            read = partial(_read_whole, package, weight)
            weights.append(CheckpointWeight(weight.module, (outputs, inputs), read, (find_kind(Linear),)))
    # Not None: the modules are known to be linear, whatever else reads an equal weight.
    return CheckpointWeights(tuple(weights), frozenset(weight.module for weight in weights), heads=frozenset())


def _is_kept_in_out(kind: GraphKind) -> bool:
    """Whether torch keeps every weight of a kind `[in, out]`."""
    return all(kind.layouts)


def _read_point(package: Package, point: InjectionPoint, part: tuple[slice, slice]) -> Array:
    weight = package.module_weight(point)
    values: Array = weight if _is_kept_in_out(find_kind(type(point.kind))) else weight.T
    return values[part]


def _read_whole(package: Package, weight: WholeWeight, part: tuple[slice, slice]) -> Array:
    values: Array = package.default(weight)[0].T
    return values[part]
