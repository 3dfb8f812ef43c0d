"""Several adapters as one set of graph inputs, one adapter for every row of a batch. It knows the layout of graph
inputs, and no session."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_lora.adapters.compose import Tensors
from onnx_lora.boundary import public
from onnx_lora.errors import SelectionError
from onnx_lora.package import Package
from onnx_lora.points import Array, InjectionPoint, WholeWeight
from onnx_lora.roles import LinearBias

__all__ = ["stack_rows"]


@public
def stack_rows(
    rows: Sequence[Tensors], package: Package, *, defaults: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """One set of graph inputs for a batch: row i gets `rows[i]`, an empty mapping is the base.

    Ranks are padded with zeros, and so are heads with fewer outputs than the widest; the padding of
    their bias is -inf, so that neither softmax nor argmax sees it. What is the same in all rows
    keeps one row. `defaults`: the base's own values of the weights that some row replaces, by parameter; without it
    they are read from the package now, and with it one that is not there differs from what rows bring.

    Raises SelectionError: rows differ where the graph cannot take that. PackageError: the package cannot be read.
    """
    if not rows:
        return {}
    if len(rows) == 1:
        return dict(rows[0])
    used = set[str]().union(*rows)
    modules = _replaced_modules(package, used)
    if defaults is None:
        defaults = _read_defaults(package, modules, rows)
    stack = _RowStack(rows, used, defaults)
    for point in package.points.values():
        stack.add_point(point)
    for module, weights in modules.items():
        stack.add_module(module, weights)
    if stack.problems:
        raise SelectionError("these rows cannot share one call; run them in separate calls", problems=stack.problems)
    return stack.tensors


def _replaced_modules(package: Package, used: Collection[str]) -> Mapping[str, Sequence[WholeWeight]]:
    """The replaceable weights of every module, for the modules in which some row replaces a weight."""
    by_module: dict[str, list[WholeWeight]] = {}
    for weight in package.replaceable.values():
        by_module.setdefault(weight.module, []).append(weight)
    replaced: dict[str, list[WholeWeight]] = {}
    for module, weights in by_module.items():
        if any(weight.name in used for weight in weights):
            replaced[module] = weights
    return replaced


def _read_defaults(
    package: Package, modules: Mapping[str, Sequence[WholeWeight]], rows: Sequence[Tensors]
) -> Mapping[str, Array]:
    """The base's own values of the weights that some row does not bring."""
    defaults: dict[str, Array] = {}
    for weights in modules.values():
        for weight in weights:
            if not all(weight.name in row for row in rows):
                defaults[weight.name] = package.default(weight)
    return defaults


@dataclass
class _RowStack:
    """The inputs of a batch, taken point by point and module by module. `used`: the inputs that some row has."""

    rows: Sequence[Tensors]
    used: Collection[str]
    defaults: Mapping[str, Array]
    tensors: dict[str, Array] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add_point(self, point: InjectionPoint) -> None:
        """The factors and the scale of one point."""
        names = [name for name in (point.lora_a, point.lora_b, point.dora_scale) if name in self.used]
        if not names:
            return
        # Comparing values takes as long as stacking them does: it is worth it only where rows must not differ.
        by_value = not point.per_row
        if all(self._is_same_in_all_rows(name, by_value=by_value) for name in names):
            for name in names:
                self.tensors[name] = self.rows[0][name]
        elif not point.per_row:
            self.problems.append(
                f"{point.module}: its place in the graph takes one adapter for all rows, and these rows differ"
            )
        else:
            self._stack_point(point)

    def _is_same_in_all_rows(self, name: str, *, by_value: bool) -> bool:
        return _is_same([row.get(name) for row in self.rows], by_value=by_value)

    def _stack_point(self, point: InjectionPoint) -> None:
        """Factors `[rows, in, r]` and `[rows, r, out]`, scales `[rows, 1, out]`; r is the largest rank of a row."""
        if point.lora_a in self.used:
            self._stack_factors(point)
        if point.dora_scale in self.used:
            ones = np.ones((1, 1, point.out_features), np.dtype(point.dtype))
            scales = [row.get(point.dora_scale, ones) for row in self.rows]
            self.tensors[point.dora_scale] = np.concatenate(scales)

    def _stack_factors(self, point: InjectionPoint) -> None:
        count = len(self.rows)
        rank = max(row[point.lora_a].shape[2] for row in self.rows if point.lora_a in row)
        a = np.zeros((count, point.in_features, rank), point.dtype)
        b = np.zeros((count, rank, point.out_features), point.dtype)
        for index, row in enumerate(self.rows):
            if point.lora_a not in row:
                continue
            row_a = row[point.lora_a][0]
            row_b = row[point.lora_b][0]
            row_rank = row_a.shape[1]
            a[index, :, :row_rank] = row_a
            b[index, :row_rank] = row_b
        self.tensors[point.lora_a] = a
        self.tensors[point.lora_b] = b

    def add_module(self, module: str, weights: Sequence[WholeWeight]) -> None:
        """The whole weights of one module: in each row its weight and its bias have the same number of outputs."""
        values: dict[str, list[Array | None]] = {}
        widths = set[int]()
        has_bias = False
        for weight in weights:
            default = self.defaults.get(weight.name)
            by_row = [row.get(weight.name, default) for row in self.rows]
            values[weight.name] = by_row
            if weight.has_rows:
                widths.update(value.shape[-1] for value in by_row if value is not None)
                has_bias = has_bias or isinstance(weight.role, LinearBias)
        is_padded = len(widths) > 1
        if is_padded and not has_bias:
            sizes = ", ".join(str(width) for width in sorted(widths))
            self.problems.append(
                f"{module}: rows with {sizes} outputs need its bias to mark those that a row does not have, and the "
                f"package does not expose it; export again with `replaceable=` including {module}"
            )
            return
        for weight in weights:
            if is_padded or weight.name in self.used:
                self._stack_weight(weight, values[weight.name], max(widths, default=0))

    def _stack_weight(self, weight: WholeWeight, values: Sequence[Array | None], outputs: int) -> None:
        """One value for all rows where they are the same; else `[rows, n, outputs]`, padded."""
        known = [value for value in values if value is not None]
        per_row = weight.per_row and weight.has_rows
        if _is_same(values, by_value=not per_row):
            self.tensors[weight.name] = known[0]
            return
        if not per_row or len(known) < len(values):
            self.problems.append(f"{weight.name}: the graph takes one value for all rows, and these rows differ")
            return
        padding = -np.inf if isinstance(weight.role, LinearBias) else 0.0
        shape = (len(known), known[0].shape[1], outputs)
        stacked = np.full(shape, padding, weight.dtype)
        for index, value in enumerate(known):
            own_outputs = value.shape[2]
            stacked[index, :, :own_outputs] = value[0]
        self.tensors[weight.name] = stacked


def _is_same(values: Sequence[Array | None], *, by_value: bool) -> bool:
    """Whether all rows have one and the same array; `by_value`: or equal ones."""
    first = values[0]
    if first is None:
        return False
    for value in values[1:]:
        if value is first:
            continue
        if not by_value or value is None or not np.array_equal(value, first):
            return False
    return True
