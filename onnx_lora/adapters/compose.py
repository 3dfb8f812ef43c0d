"""Several bound adapters as one set of graph inputs: blended into one, or one for every row of a batch.

It knows the layout of graph inputs, and no session."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath

import numpy as np

from onnx_lora.adapters.adapter import BoundAdapter, Coverage, Origin
from onnx_lora.arguments import is_finite_number
from onnx_lora.boundary import public
from onnx_lora.errors import SelectionError
from onnx_lora.package import Package
from onnx_lora.points import Array, InjectionPoint, WholeWeight
from onnx_lora.roles import LinearBias

__all__ = ["blend", "blended", "stack_rows"]

Tensors = Mapping[str, Array]  # by graph input name

_SCALE = ".dora_scale"


@public
def blend(parts: Sequence[tuple[BoundAdapter, float]]) -> Tensors:
    """The weighted sum of adapters, exact: factors side by side along the rank, the weight in B.

    One part of weight 1 gives its own tensors, uncopied; no part gives the base. Raises
    SelectionError: a weight that is not a finite number, a whole weight or another change that does not add and that
    more than one part brings or that a part of another weight than 1 brings, parts bound to different packages.
    """
    problems = [
        f"{part.name}: a weight must be a finite number, and is {weight!r}"
        for part, weight in parts
        if not is_finite_number(weight)
    ]
    problems += _replaced_problems(parts) + _alone_problems(parts)
    if problems:
        raise SelectionError("these adapters cannot be blended so", problems=problems)
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0].tensors
    tensors: dict[str, Array] = {}
    for part, _ in parts:
        tensors.update((name, part.tensors[name]) for name in part.coverage.replaced)
        tensors.update((name, tensor) for name, tensor in part.tensors.items() if name.endswith(_SCALE))
    for module in dict.fromkeys(module for part, _ in parts for module in part.coverage.applied):
        tensors.update(_blend_point(module, parts))
    return tensors


@public
def blended(parts: Sequence[tuple[BoundAdapter, float]], *, name: str) -> BoundAdapter:
    """A blend as an adapter of its own, called `name`: the sum that `blend` gives, and what is known of its parts.

    Its origin lists the parts'. One part of weight 1 is that adapter itself, under its own name. Raises SelectionError:
    as `blend`, and no part, or parts bound to different bases.
    """
    if not parts:
        raise SelectionError("a blend must have an adapter at least, and has none")
    if len(parts) == 1 and is_finite_number(parts[0][1]) and parts[0][1] == 1.0:
        return parts[0][0]
    tensors = dict(blend(parts))
    for tensor in tensors.values():
        tensor.flags.writeable = False
    adapters = [part for part, _ in parts]
    origins = [part.origin for part in adapters]
    origin = Origin(
        path=", ".join(PurePath(origin.path).name for origin in origins),
        sha256=", ".join(origin.sha256 for origin in origins),
        format=", ".join(dict.fromkeys(origin.format for origin in origins)),
        method="blend of " + ", ".join(f"{part.name}:{float(weight):g}" for part, weight in parts),
        base_model=", ".join(dict.fromkeys(origin.base_model for origin in origins if origin.base_model)),
    )
    coverage = _merged_coverage(adapters, tensors)
    return BoundAdapter(
        name=name,
        tensors=tensors,
        coverage=coverage,
        origin=origin,
        base_digests=_merged_digests(adapters),
        graphs=adapters[0].graphs,
        changes={module: change for part in adapters for module, change in part.changes.items()},
        magnitudes={module: values for part in adapters for module, values in part.magnitudes.items()},
        made_of={module: mark for part in adapters for module, mark in part.made_of.items()},
        base_names=adapters[0].base_names,
    )


def _merged_coverage(adapters: Sequence[BoundAdapter], tensors: Tensors) -> Coverage:
    covers = [part.coverage for part in adapters]
    touched = {module: None for cover in covers for module in cover.applied}
    # In the package's order, which no part's list need have whole.
    order = {point.module: None for graph in adapters[0].graphs for point in graph.points}
    applied = tuple(module for module in order | touched if module in touched)
    changed = set(touched).union(*(set(covers[0].at_base).difference(cover.at_base) for cover in covers))
    factors = [module for module in applied if f"{module}.lora_B.weight" in tensors]
    return Coverage(
        applied=applied,
        replaced=tuple(parameter for cover in covers for parameter in cover.replaced),
        at_base=tuple(module for module in covers[0].at_base if module not in changed),
        silent=tuple(
            module for module in factors if f"{module}{_SCALE}" not in tensors and not _b(module, tensors).any()
        ),
        ranks={module: tensors[f"{module}.lora_A.weight"].shape[2] for module in factors},
        notes=tuple(f"{part.name}: {note}" for part in adapters for note in part.coverage.notes),
        fold_only={module: reason for cover in covers for module, reason in cover.fold_only.items()},
    )


def _b(module: str, tensors: Tensors) -> Array:
    return tensors[f"{module}.lora_B.weight"]


def _merged_digests(adapters: Sequence[BoundAdapter]) -> dict[str, str]:
    digests: dict[str, str] = {}
    problems = []
    for part in adapters:
        other = [name for name, value in part.base_digests.items() if digests.setdefault(name, value) != value]
        if other:
            problems.append(f"{part.name}: {len(other)} of its base weights are others, the first is {other[0]}")
    if problems:
        raise SelectionError("adapters of one blend must be bound to one base", problems=problems)
    return digests


def _replaced_problems(parts: Sequence[tuple[BoundAdapter, float]]) -> list[str]:
    """Whole weights do not add: one adapter brings them, as they are, or none."""
    owners: dict[str, list[tuple[str, float]]] = {}
    for part, weight in parts:
        for parameter in part.coverage.replaced:
            owners.setdefault(parameter, []).append((part.name, weight))
    return [
        f"{parameter}: a whole weight must come from one adapter of weight 1.0, and comes from "
        + ", ".join(f"{name!r} of weight {weight}" for name, weight in found)
        for parameter, found in owners.items()
        if len(found) > 1 or found[0][1] != 1.0
    ]


def _alone_problems(parts: Sequence[tuple[BoundAdapter, float]]) -> list[str]:
    """DoRA and what only folds are no sums: such a module is one adapter's, whole."""
    problems: list[str] = []
    touched = [{*part.coverage.applied, *part.coverage.replaced} for part, _ in parts]
    alone = {
        module: None
        for part, _ in parts
        for module in part.coverage.applied
        if module in part.changes or f"{module}{_SCALE}" in part.tensors
    }
    for module in alone:
        found = [
            (part.name, weight)
            for (part, weight), own in zip(parts, touched, strict=True)
            if module in own or f"{module}.weight" in own
        ]
        if len(found) > 1 or found[0][1] != 1.0:
            problems.append(
                f"{module}: its change (DoRA, or one that only folds) does not add to others, and must come from one "
                "adapter of weight 1.0; it comes from "
                + ", ".join(f"{name!r} of weight {weight}" for name, weight in found)
            )
    return problems


def _blend_point(module: str, parts: Sequence[tuple[BoundAdapter, float]]) -> dict[str, Array]:
    name_a, name_b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    having = [(part, float(weight)) for part, weight in parts if name_a in part.tensors]
    if not having:
        return {}
    a = [part.tensors[name_a] for part, _ in having]
    b = [_weighted(part, name_b, weight) for part, weight in having]
    kinds = {(first.shape[1], second.shape[2], first.dtype) for first, second in zip(a, b, strict=True)}
    if len(kinds) > 1:
        raise SelectionError(
            f"{module}: adapters of one blend must be bound to one package, and these differ in shape or type: "
            + ", ".join(part.name for part, _ in having)
        )
    return {name_a: np.concatenate(a, axis=2), name_b: np.concatenate(b, axis=1)}


def _weighted(part: BoundAdapter, name: str, weight: float) -> Array:
    """B times the weight, rounded once."""
    b = part.tensors[name]
    if weight == 1.0:
        return b
    with np.errstate(over="ignore"):
        weighted: Array = (b.astype(np.float64) * weight).astype(b.dtype)
    if not np.isfinite(weighted).all():
        raise SelectionError(f"{part.name}: weight {weight} takes {name} beyond what {b.dtype.name} holds")
    return weighted


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
    used = {name for row in rows for name in row}
    tensors: dict[str, Array] = {}
    problems: list[str] = []
    for point in package.points.values():
        own = used & {point.lora_a, point.lora_b, point.dora_scale}
        if own and not point.per_row and not _same_everywhere(own, rows):
            problems.append(
                f"{point.module}: its place in the graph takes one adapter for all rows, and these rows differ"
            )
        elif own:
            tensors.update(_stack_point(point, own, rows))
    modules: dict[str, list[WholeWeight]] = {}
    for weight in package.replaceable.values():
        modules.setdefault(weight.module, []).append(weight)
    touched = {module: weights for module, weights in modules.items() if any(weight.name in used for weight in weights)}
    if defaults is None:
        own_weights = [weight for weights in touched.values() for weight in weights]
        lacking = [weight for weight in own_weights if not all(weight.name in row for row in rows)]
        defaults = {weight.name: package.default(weight) for weight in lacking}
    for module, weights in touched.items():
        _stack_module(module, weights, rows, defaults, tensors, problems)
    if problems:
        raise SelectionError("these rows cannot share one call; run them in separate calls", problems=problems)
    return tensors


def _same(values: Sequence[Array | None], *, by_value: bool) -> bool:
    """Whether all rows have one array. Comparing values takes as long as stacking them does, and
    is worth it only where rows must not differ."""
    first = values[0]
    return first is not None and all(
        value is first or (by_value and value is not None and np.array_equal(value, first)) for value in values[1:]
    )


def _same_everywhere(names: Collection[str], rows: Sequence[Tensors]) -> bool:
    return all(_same([row.get(name) for row in rows], by_value=True) for name in names)


def _stack_point(point: InjectionPoint, names: Collection[str], rows: Sequence[Tensors]) -> dict[str, Array]:
    """The tensors of one point, row by row; of `names`, those that some row has."""
    if all(_same([row.get(name) for row in rows], by_value=not point.per_row) for name in names):
        return {name: rows[0][name] for name in names}
    tensors: dict[str, Array] = {}
    if point.lora_a in names:
        rank = max(row[point.lora_a].shape[2] for row in rows if point.lora_a in row)
        a = np.zeros((len(rows), point.in_features, rank), point.dtype)
        b = np.zeros((len(rows), rank, point.out_features), point.dtype)
        for index, row in enumerate(rows):
            if point.lora_a in row:
                own = row[point.lora_a].shape[2]
                a[index, :, :own] = row[point.lora_a][0]
                b[index, :own] = row[point.lora_b][0]
        tensors = {point.lora_a: a, point.lora_b: b}
    if point.dora_scale in names:
        ones = np.ones((1, 1, point.out_features), np.dtype(point.dtype))
        tensors[point.dora_scale] = np.concatenate([row.get(point.dora_scale, ones) for row in rows])
    return tensors


def _stack_module(
    module: str,
    weights: Sequence[WholeWeight],
    rows: Sequence[Tensors],
    defaults: Mapping[str, Array],
    tensors: dict[str, Array],
    problems: list[str],
) -> None:
    """The whole weights of one module: its weight and its bias have the same number of outputs."""
    values = {weight.name: [row.get(weight.name, defaults.get(weight.name)) for row in rows] for weight in weights}
    heads = [weight for weight in weights if weight.has_rows]
    widths = {value.shape[-1] for weight in heads for value in values[weight.name] if value is not None}
    padded = len(widths) > 1
    if padded and not any(isinstance(weight.role, LinearBias) for weight in heads):
        problems.append(
            f"{module}: rows with {', '.join(map(str, sorted(widths)))} outputs need its bias to mark those that a row "
            f"does not have, and the package does not expose it; export again with --replaceable {module}"
        )
        return
    for weight in weights:
        if padded or any(weight.name in row for row in rows):
            _stack_weight(weight, values[weight.name], max(widths, default=0), tensors, problems)


def _stack_weight(
    weight: WholeWeight, values: Sequence[Array | None], width: int, tensors: dict[str, Array], problems: list[str]
) -> None:
    known = [value for value in values if value is not None]
    per_row = weight.per_row and weight.has_rows
    if _same(values, by_value=not per_row):
        tensors[weight.name] = known[0]
    elif not per_row or len(known) < len(values):
        problems.append(f"{weight.name}: the graph takes one value for all rows, and these rows differ")
    else:
        fill = -np.inf if isinstance(weight.role, LinearBias) else 0.0
        stacked = np.full((len(known), known[0].shape[1], width), fill, weight.dtype)
        for index, value in enumerate(known):
            stacked[index, :, : value.shape[2]] = value[0]
        tensors[weight.name] = stacked
