"""An adapter checked against a package, once and for all, and laid out as the inputs of its graphs.

All checks that there are of an adapter's tensors are here and in what this calls; formats check only what they need to
read a file. It knows points and replaceable weights, and no file format."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, Coverage, Delta, MatrixDelta
from onnx_lora.adapters.align import AlignedAdapter, align
from onnx_lora.adapters.bases import base_problem
from onnx_lora.adapters.explain import PROVE, explain_doubts, explain_modules, explain_parameters
from onnx_lora.adapters.own_heads import judge_own_heads
from onnx_lora.adapters.point_layout import PointLayout
from onnx_lora.adapters.problems import list_first
from onnx_lora.adapters.rebinding import rebind
from onnx_lora.adapters.tensor_layout import TensorLayout
from onnx_lora.adapters.weight_layout import WeightLayout, is_bare_parameter
from onnx_lora.boundary import public
from onnx_lora.errors import BindError
from onnx_lora.package import Package
from onnx_lora.points import matching

__all__ = ["bind"]

# Names in one note.
_MOST_NAMES = 3


@public
def bind(
    adapter: Adapter | AlignedAdapter | BoundAdapter,
    package: Package,
    *,
    strict: bool = False,
    allow_unproven: bool = False,
) -> BoundAdapter:
    """Check `adapter` against `package` and lay it out. One that was bound already is checked to fit this package too.

    `coverage.fold_only` names what only folding can apply here; the rest runs unfolded too. If the adapter names
    another base than the package's, `coverage.notes` says so; with `strict` the adapter is refused. Points at which the
    graph may compute something else than the module are refused; with `allow_unproven` they are noted.

    Raises BindError: every reason why it cannot be applied exactly.
    """
    package = package.allowing_unproven(allow_unproven)
    if isinstance(adapter, BoundAdapter):
        return rebind(adapter, package, strict=strict)
    aligned = _aligned_with(adapter, package)
    adapter = aligned.adapter
    layout = TensorLayout()
    points = _lay_out_points(adapter, package, layout)
    weights = _lay_out_weights(adapter, package, layout)
    digests = _module_digests(adapter, package) | weights.digests
    changed = dict.fromkeys([*digests, *weights.replaced])
    own_heads = judge_own_heads(adapter, package)
    digests |= own_heads.digests
    idle = _idle_modules(adapter, package)
    problems = [
        *aligned.problems,
        *_name_problems(adapter, idle, weights.replaced, package),
        *_conflicts(adapter, package),
        *layout.problems,
        *_saved_module_problems(adapter, package),
        *own_heads.problems,
        *_base_problems(adapter, digests, package),
    ]
    notes = [*adapter.notes, *weights.notes, *own_heads.notes]
    if idle:
        notes.append(f"{list_first(idle, _MOST_NAMES)}: not in the package, and B is zero: there is nothing to apply")
    doubts = explain_doubts(changed, package)
    if package.allow_unproven:
        notes.extend(doubts)
    else:
        problems.extend(f"{doubt}; {PROVE}" for doubt in doubts)
    other_base = base_problem(adapter.origin.base_model, package)
    if other_base is not None and strict:
        problems.append(other_base)
    elif other_base is not None:
        notes.append(other_base)
    if not problems and not adapter.deltas and not adapter.replacements and not adapter.changes:
        problems.append("it holds nothing: there must be at least one delta or one whole weight")
    if problems:
        raise BindError(
            f"adapter {adapter.name!r} does not fit the package {package.path}",
            path=adapter.origin.path,
            problems=problems,
        )
    return BoundAdapter(
        name=adapter.name,
        tensors=layout.tensors,
        coverage=_coverage(points, weights, notes),
        origin=adapter.origin,
        base_digests=digests,
        graphs=package.manifest.graphs,
        changes=points.changes,
        magnitudes=points.magnitudes,
        made_of={**adapter.made_of, **points.made_of},
        base_names=package.base_names,
    )


def _aligned_with(adapter: Adapter | AlignedAdapter, package: Package) -> AlignedAdapter:
    """Raises BindError: it was aligned with another package; as `align`."""
    if isinstance(adapter, Adapter):
        return align(adapter, package)
    if adapter.package.manifest.graphs != package.manifest.graphs:
        raise BindError(
            f"adapter {adapter.adapter.name!r} was aligned with the package {adapter.package.path}, and must be "
            f"aligned with the one that it is bound to, {package.path}",
            path=adapter.adapter.origin.path,
        )
    return adapter


# --- laying out --------------------------------------------------------------------------------


def _lay_out_points(adapter: Adapter, package: Package, layout: TensorLayout) -> PointLayout:
    """The deltas and changes of the modules that have a point; what has none is one of the `_name_problems`."""
    points = PointLayout(package, layout, adapter.base_digests)
    for module, delta in adapter.deltas.items():
        if module in package.points:
            points.add_delta(package.points[module], delta)
    for module, change in adapter.changes.items():
        if module in package.points and module not in adapter.deltas:
            points.add_change(package.points[module], change)
    return points


def _lay_out_weights(adapter: Adapter, package: Package, layout: TensorLayout) -> WeightLayout:
    """The changes of bare parameters, and the whole weights that the adapter brings."""
    weights = WeightLayout(package, layout)
    for name, change in adapter.changes.items():
        if is_bare_parameter(name, package):
            weights.add_change(package.replaceable[name], change)
    for name in sorted(adapter.replacements):
        weights.add_replacement(name, adapter.replacements[name])
    weights.check_heads()
    return weights


def _changed_modules(adapter: Adapter, package: Package) -> list[str]:
    """The modules with a delta or another change, each once."""
    names = dict.fromkeys([*adapter.deltas, *adapter.changes])
    return [name for name in names if name not in adapter.changes or not is_bare_parameter(name, package)]


def _module_digests(adapter: Adapter, package: Package) -> dict[str, str]:
    """The SHA-256 of the base's weight of every changed module."""
    modules = _changed_modules(adapter, package)
    return {module: package.points[module].sha256 for module in modules if module in package.points}


# --- checks ------------------------------------------------------------------------------------


def _idle_modules(adapter: Adapter, package: Package) -> list[str]:
    """Modules that no graph of the package has, with a delta that changes nothing, as an unused pooler keeps it from a
    training on all linear modules. None where the package has no module of the adapter: it is of another model then."""
    has_own = any(module in package.modules for module in _changed_modules(adapter, package))
    if not has_own:
        return []
    idle: list[str] = []
    for module, delta in adapter.deltas.items():
        is_elsewhere = module in package.modules or module in adapter.changes
        if not is_elsewhere and _changes_nothing(delta):
            idle.append(module)
    return idle


def _changes_nothing(delta: Delta | MatrixDelta) -> bool:
    """Whether `scale · b · a` is zero whatever the base, and nothing else is changed."""
    is_finite = bool(np.isfinite(delta.a).all()) and math.isfinite(delta.scale)
    return is_finite and not _rescales(delta) and not delta.b.any()


def _name_problems(adapter: Adapter, idle: Collection[str], replaced: Iterable[str], package: Package) -> list[str]:
    """Modules without a point, and parameters that the package cannot replace. `idle`: modules that need none."""
    changed = _changed_modules(adapter, package)
    modules = [module for module in changed if module not in package.points and module not in idle]
    parameters = [name for name in replaced if name not in package.replaceable]
    return [*explain_modules(modules, package), *explain_parameters(parameters, package)]


def _conflicts(adapter: Adapter, package: Package) -> list[str]:
    """Modules that the adapter changes in two ways, where the result depends on which of them comes first."""
    problems: list[str] = []
    for module in adapter.deltas:
        if module in adapter.changes:
            problems.append(
                f"{module}: has a delta and {adapter.changes[module].method} too, and the adapter does not say which "
                "of the two is applied first; merge one of them with PEFT"
            )
    for name, method in _methods_by_weight(adapter).items():
        parameter = name if is_bare_parameter(name, package) else f"{name}.weight"
        if _is_replaced(parameter, adapter, package):
            problems.append(
                f"{name}: has {method} and a whole weight too, and the adapter does not say whether {method} changes "
                "the base's weight or the new one; merge it with PEFT"
            )
    return problems


def _methods_by_weight(adapter: Adapter) -> dict[str, str]:
    """Modules and parameters whose change depends on the weight that it is applied to, and the change's method."""
    methods: dict[str, str] = {}
    for module, delta in adapter.deltas.items():
        if _rescales(delta):
            methods[module] = "DoRA"
    for name, change in adapter.changes.items():
        methods[name] = change.method
    return methods


def _rescales(delta: Delta | MatrixDelta) -> bool:
    """Whether it scales the module's outputs, beside what it adds."""
    has_output_scale = isinstance(delta, MatrixDelta) and delta.output_scale is not None
    return has_output_scale or delta.magnitude is not None


def _is_replaced(parameter: str, adapter: Adapter, package: Package) -> bool:
    """Whether the adapter brings a whole weight for it that is not the base's own."""
    whole = adapter.replacements.get(parameter)
    if whole is None:
        return False
    return not (whole.in_place and package.has_value(parameter, whole.value))


def _saved_module_problems(adapter: Adapter, package: Package) -> list[str]:
    """Modules that the adapter must bring whole, the model has, and the file lacks."""
    names = dict.fromkeys(adapter.saved_modules)
    brought = matching(names, {name.rpartition(".")[0] for name in adapter.replacements})
    in_model = matching(names, package.modules)
    problems: list[str] = []
    for name in names:
        if name in in_model and name not in brought:
            problems.append(
                f"{name}: the config says that PEFT saved this module whole, the model has it, and the file holds no "
                "tensor of it; get the whole file, or correct modules_to_save"
            )
    return problems


def _base_problems(adapter: Adapter, digests: dict[str, str], package: Package) -> list[str]:
    """Where the adapter was bound to other weights than the package's, or its tensors were computed from such."""
    problems: list[str] = []
    for module, mark in adapter.made_of.items():
        if module in package.points and package.mark(package.points[module]) != mark:
            problems.append(
                f"{module}: its tensors were made from the weights of another precision of this base; convert the "
                "adapter itself for this package"
            )
    known = adapter.base_digests
    others: list[str] = []
    if known:
        # Among them may be those of a head that the adapter does not change, and means.
        wanted = {name: package.digests[name] for name in known if name in package.digests} | digests
        others = [name for name, digest in wanted.items() if known.get(name) != digest]
    if others:
        problems.append(
            f"it was bound to another base: {len(others)} of {len(wanted)} base weights differ, the first is "
            f"{others[0]}; convert the adapter again for this package, or take the package it belongs to"
        )
    return problems


# --- coverage ----------------------------------------------------------------------------------


def _coverage(points: PointLayout, weights: WeightLayout, notes: Iterable[str]) -> Coverage:
    """What was laid out, module by module, in the package's order."""
    tensors = points.layout.tensors
    applied: list[str] = []
    silent: list[str] = []
    ranks: dict[str, int] = {}
    for module, point in points.package.points.items():
        is_scaled = point.dora_scale in tensors
        if point.lora_a in tensors:
            ranks[module] = tensors[point.lora_a].shape[2]
            if not is_scaled and not tensors[point.lora_b].any():
                silent.append(module)
        if point.lora_a in tensors or is_scaled or module in points.changes:
            applied.append(module)
    all_notes = dict.fromkeys(notes)
    if silent:
        all_notes[_note_on_silence(len(silent), len(applied))] = None
    changed = set(applied)
    changed.update(name.removesuffix(".weight") for name in weights.replaced)
    return Coverage(
        applied=tuple(applied),
        replaced=tuple(weights.replaced),
        at_base=tuple(module for module in points.package.points if module not in changed),
        silent=tuple(silent),
        ranks=ranks,
        notes=tuple(all_notes),
        fold_only=points.fold_only,
    )


def _note_on_silence(silent: int, applied: int) -> str:
    if silent == applied:
        return "every B is zero: the adapter was never trained, and its deltas change nothing"
    return f"{silent} of {applied} deltas change nothing, their B is zero"
