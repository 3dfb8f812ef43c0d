"""Several bound adapters blended into one: as tensors by graph input, or as an adapter of its own.

Factors add. Whole weights, scales of outputs (DoRA) and changes that only fold do not: each of these must be of one
adapter alone. It knows the layout of graph inputs, and no session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np

from onnx_lora.adapters.adapter import BoundAdapter, Coverage, Origin
from onnx_lora.adapters.groups import group_problems
from onnx_lora.boundary import public
from onnx_lora.errors import SelectionError
from onnx_lora.points import Array
from onnx_lora.strength import Strength, Weight, as_strength, say_weight, weight_in, weight_problem

__all__ = ["Parts", "Tensors", "add_up", "blend", "check_weights", "make_blend"]

T = TypeVar("T")

Tensors = Mapping[str, Array]  # by graph input name
Parts = Sequence[tuple[BoundAdapter, float | Strength]]  # adapters and their weights

_A, _B, _SCALE = ".lora_A.weight", ".lora_B.weight", ".dora_scale"


@public
def blend(parts: Sequence[tuple[BoundAdapter, float | Mapping[str, float]]]) -> Tensors:
    """The weighted sum of adapters, exact: factors side by side along the rank, the weight in B.

    A weight is a number, or numbers by groups of modules, `{"down_blocks": 0.6, "*": 1.0}` (see `strength.py`). One
    part of weight 1 gives its own tensors, uncopied; no part gives the base.

    Raises SelectionError: a weight that is no finite number, a group without a module; parts that are bound to
    different packages; a whole weight, or a change that does not add, which more than one part brings, or a part of
    another weight than 1.
    """
    return add_up(check_weights(parts))


def check_weights(parts: Sequence[tuple[BoundAdapter, Weight | Strength]]) -> Parts:
    """The parts with their weights as they are kept. Raises SelectionError: one is no weight, or names no module."""
    problems: list[str] = []
    checked: list[tuple[BoundAdapter, float | Strength]] = []
    for part, weight in parts:
        problem = None if isinstance(weight, Strength) else weight_problem(weight)
        if problem is not None:
            problems.append(f"{part.name}: a weight must be {problem}")
            continue
        own = as_strength(weight)
        problems.extend(group_problems(part, own))
        checked.append((part, own))
    if problems:
        raise SelectionError("these adapters cannot be blended so", problems=problems)
    return checked


def add_up(parts: Parts) -> Tensors:
    """What `blend` gives, of parts whose weights were checked. Raises SelectionError: they do not add."""
    problems = [*_whole_weight_problems(parts), *_unaddable_problems(parts)]
    if problems:
        raise SelectionError("these adapters cannot be blended so", problems=problems)
    if _is_one_whole(parts):
        [(only, _)] = parts
        return only.tensors
    tensors: dict[str, Array] = {}
    for part, _ in parts:
        for name in part.coverage.replaced:
            tensors[name] = part.tensors[name]
        for name, tensor in part.tensors.items():
            if name.endswith(_SCALE):
                tensors[name] = tensor
    for module in _applied_modules(parts):
        tensors.update(_blend_factors(module, parts))
    return tensors


@public
def make_blend(parts: Sequence[tuple[BoundAdapter, float | Mapping[str, float]]], *, name: str) -> BoundAdapter:
    """A blend as an adapter of its own, called `name`: the sum that `blend` gives, and what is known of its parts.

    Its origin lists the parts'. One part of weight 1 is that adapter itself, under its own name.

    Raises SelectionError: as `blend`, and no part, or parts bound to different bases.
    """
    if not parts:
        raise SelectionError("a blend must have an adapter at least, and has none")
    checked = check_weights(parts)
    if _is_one_whole(checked):
        return checked[0][0]
    tensors = dict(add_up(checked))
    for tensor in tensors.values():
        tensor.flags.writeable = False
    adapters = [part for part, _ in parts]
    return BoundAdapter(
        name=name,
        tensors=tensors,
        coverage=_blend_coverage(adapters, tensors),
        origin=_blend_origin(checked),
        base_digests=_blend_digests(adapters),
        graphs=adapters[0].graphs,
        changes=_union(part.changes for part in adapters),
        magnitudes=_union(part.magnitudes for part in adapters),
        made_of=_union(part.made_of for part in adapters),
        base_names=adapters[0].base_names,
    )


# --- what cannot be blended --------------------------------------------------------------------


def _whole_weight_problems(parts: Parts) -> list[str]:
    """Whole weights do not add: one adapter brings them, as they are, or none."""
    owners: dict[str, list[tuple[BoundAdapter, float | Strength]]] = {}
    for part, weight in parts:
        for parameter in part.coverage.replaced:
            own = weight_in(weight, parameter.rpartition(".")[0])
            owners.setdefault(parameter, []).append((part, own))
    problems: list[str] = []
    for parameter, found in owners.items():
        if not _is_one_whole(found):
            problems.append(
                f"{parameter}: a whole weight must come from one adapter of weight 1.0, and comes from "
                f"{_list_parts(found)}"
            )
    return problems


def _unaddable_problems(parts: Parts) -> list[str]:
    """DoRA and what only folds are no sums: such a module is one adapter's, whole."""
    changed: list[frozenset[str]] = []  # modules and parameters, by part
    for part, _ in parts:
        changed.append(frozenset([*part.coverage.applied, *part.coverage.replaced]))
    problems: list[str] = []
    for module in _unaddable_modules(parts):
        owners: list[tuple[BoundAdapter, float | Strength]] = []
        for (part, weight), names in zip(parts, changed, strict=True):
            if module in names or f"{module}.weight" in names:
                owners.append((part, weight_in(weight, module)))
        if not _is_one_whole(owners):
            problems.append(
                f"{module}: its change (DoRA, or one that only folds) does not add to others, and must come from one "
                f"adapter of weight 1.0; it comes from {_list_parts(owners)}"
            )
    return problems


def _unaddable_modules(parts: Parts) -> list[str]:
    """The modules that some part changes by DoRA, or by what only folds."""
    modules: dict[str, None] = {}
    for part, _ in parts:
        for module in part.coverage.applied:
            if module in part.changes or f"{module}{_SCALE}" in part.tensors:
                modules[module] = None
    return list(modules)


def _is_one_whole(parts: Parts) -> bool:
    """Whether it is one part, of weight 1."""
    return len(parts) == 1 and parts[0][1] == 1.0


def _list_parts(parts: Parts) -> str:
    return ", ".join(f"{part.name!r} of weight {weight}" for part, weight in parts)


# --- sums --------------------------------------------------------------------------------------


def _applied_modules(parts: Parts) -> list[str]:
    modules: dict[str, None] = {}
    for part, _ in parts:
        modules.update(dict.fromkeys(part.coverage.applied))
    return list(modules)


def _blend_factors(module: str, parts: Parts) -> Tensors:
    """The factors of all parts that have some for this module, side by side along the rank: A `[1, in, sum of r]`,
    B `[1, sum of r, out]`. Empty where no part has any."""
    name_a = module + _A
    name_b = module + _B
    all_a: list[Array] = []
    all_b: list[Array] = []
    layouts: set[tuple[int, int, np.dtype[Any]]] = set()
    owners: list[str] = []
    for part, weight in parts:
        if name_a not in part.tensors:
            continue
        a = part.tensors[name_a]
        b = _weigh(part, name_b, weight_in(weight, module))
        all_a.append(a)
        all_b.append(b)
        layouts.add((a.shape[1], b.shape[2], a.dtype))
        owners.append(part.name)
    if not owners:
        return {}
    if len(layouts) > 1:
        raise SelectionError(
            f"{module}: adapters of one blend must be bound to one package, and these differ in shape or type: "
            f"{', '.join(owners)}"
        )
    return {name_a: np.concatenate(all_a, axis=2), name_b: np.concatenate(all_b, axis=1)}


def _weigh(part: BoundAdapter, name: str, weight: float) -> Array:
    """B times the weight, rounded once. Raises SelectionError: the product is beyond what the type holds."""
    b = part.tensors[name]
    if weight == 1.0:
        return b
    with np.errstate(over="ignore"):
        weighted: Array = (b.astype(np.float64) * weight).astype(b.dtype)
    if not np.isfinite(weighted).all():
        raise SelectionError(f"{part.name}: weight {weight} takes {name} beyond what {b.dtype.name} holds")
    return weighted


# --- what is known of a blend ------------------------------------------------------------------


def _blend_origin(parts: Parts) -> Origin:
    origins = [part.origin for part, _ in parts]
    return Origin(
        path=", ".join(PurePath(origin.path).name for origin in origins),
        sha256=", ".join(origin.sha256 for origin in origins),
        format=", ".join(dict.fromkeys(origin.format for origin in origins)),
        method="blend of " + ", ".join(f"{part.name}:{say_weight(weight)}" for part, weight in parts),
        base_model=", ".join(dict.fromkeys(origin.base_model for origin in origins if origin.base_model)),
    )


def _blend_coverage(adapters: Sequence[BoundAdapter], tensors: Tensors) -> Coverage:
    coverages = [part.coverage for part in adapters]
    applied = _in_package_order(adapters)
    ranks: dict[str, int] = {}
    silent: list[str] = []
    for module in applied:
        b = tensors.get(module + _B)
        if b is None:
            continue
        ranks[module] = b.shape[1]
        if module + _SCALE not in tensors and not b.any():
            silent.append(module)
    at_base_in_all = set(coverages[0].at_base)
    for coverage in coverages:
        at_base_in_all.intersection_update(coverage.at_base)
    replaced: list[str] = []
    notes: list[str] = []
    for part in adapters:
        replaced.extend(part.coverage.replaced)
        notes.extend(f"{part.name}: {note}" for note in part.coverage.notes)
    return Coverage(
        applied=tuple(applied),
        replaced=tuple(replaced),
        at_base=tuple(module for module in coverages[0].at_base if module in at_base_in_all),
        silent=tuple(silent),
        ranks=ranks,
        notes=tuple(notes),
        fold_only=_union(coverage.fold_only for coverage in coverages),
    )


def _in_package_order(adapters: Sequence[BoundAdapter]) -> list[str]:
    """The modules that some adapter changes, in the package's order, which no adapter's own list need have whole."""
    changed: dict[str, None] = {}
    for part in adapters:
        changed.update(dict.fromkeys(part.coverage.applied))
    in_package: dict[str, None] = {}
    for graph in adapters[0].graphs:
        in_package.update((point.module, None) for point in graph.points)
    in_package.update(changed)
    return [module for module in in_package if module in changed]


def _blend_digests(adapters: Sequence[BoundAdapter]) -> dict[str, str]:
    """The digests of the base weights that some part changes. Raises SelectionError: two parts have different ones."""
    digests: dict[str, str] = {}
    problems: list[str] = []
    for part in adapters:
        others: list[str] = []
        for name, digest in part.base_digests.items():
            if digests.setdefault(name, digest) != digest:
                others.append(name)
        if others:
            problems.append(f"{part.name}: {len(others)} of its base weights are others, the first is {others[0]}")
    if problems:
        raise SelectionError("adapters of one blend must be bound to one base", problems=problems)
    return digests


def _union(mappings: Iterable[Mapping[str, T]]) -> dict[str, T]:
    """All entries; of a key that several have, the last."""
    union: dict[str, T] = {}
    for mapping in mappings:
        union.update(mapping)
    return union
