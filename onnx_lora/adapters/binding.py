"""An adapter checked against a package, once and for all, and laid out as its graph's inputs.

It knows points and replaceable weights, and no file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from onnx_lora.adapters.adapter import (
    NO_SCALE,
    Adapter,
    BoundAdapter,
    Change,
    Coverage,
    Delta,
    MatrixDelta,
    Replacement,
)
from onnx_lora.adapters.bases import base_number, base_problem
from onnx_lora.adapters.explain import PROVE, explain_doubts, explain_modules, explain_parameters
from onnx_lora.adapters.factors import as_matrices, column_norms, delta_problems, depends_on_weight, value_problems
from onnx_lora.adapters.methods.output_scale import OutputScale
from onnx_lora.adapters.names import resolved
from onnx_lora.adapters.tied import with_tied
from onnx_lora.boundary import public
from onnx_lora.errors import BindError
from onnx_lora.heads import OFTEN_TIED
from onnx_lora.kinds import LINEAR
from onnx_lora.package import Package
from onnx_lora.points import Array, InjectionPoint, WholeWeight, digest, in_memory, matching

__all__ = ["bind"]

_OTHER_NUMBER = (
    "the number that stands for its base weights is not this package's: it was converted for another base, or other "
    "modules; convert the adapter again for this package, or take the package it belongs to"
)


@public
def bind(adapter: Adapter, package: Package, *, strict: bool = False, allow_unproven: bool = False) -> BoundAdapter:
    """Check `adapter` against `package` and lay it out.

    What only folding can apply here is named in `coverage.fold_only`; the rest runs unfolded too. An adapter that
    names another base than the package's is noted in `coverage.notes`, and refused if `strict`. Points at which the
    graph may compute something else than the module are refused, and noted if the caller `allow_unproven`.

    Raises BindError: every reason why it cannot be applied exactly.
    """
    package = package.allowing_unproven(allow_unproven)
    names = [*adapter.deltas, *adapter.changes, *adapter.replacements]  # an .onnx_adapter's are those of branches
    number = None if adapter.base_number is None else base_number(names, package.manifest.graphs)
    adapter = resolved(adapter, package)
    adapter, untold = with_tied(adapter, package)
    adapter = _by_module(adapter, package)
    binder = _Binder(adapter, package, problems=untold, notes=list(adapter.notes))
    binder.check_modules()
    binder.bind_deltas()
    binder.bind_changes()
    binder.bind_replacements()
    binder.check_heads()
    binder.check_saved_modules()
    binder.check_base()
    binder.check_proven()
    binder.check_base_name(strict=strict)
    if number != adapter.base_number:
        binder.problems.append(_OTHER_NUMBER)
    if not adapter.deltas and not adapter.replacements and not adapter.changes:
        binder.problems.append("it holds nothing: there must be at least one delta or one whole weight")
    if binder.problems:
        raise BindError(
            f"adapter {adapter.name!r} does not fit the package {package.path}",
            path=adapter.origin.path,
            problems=binder.problems,
        )
    return BoundAdapter(
        name=adapter.name,
        tensors=binder.tensors,
        coverage=binder.coverage(),
        origin=adapter.origin,
        base_digests=binder.digests,
        graphs=package.manifest.graphs,
        changes=binder.changes,
        magnitudes=binder.magnitudes,
        made_of={**adapter.made_of, **binder.made_of},
        base_names=package.base_names,
    )


def _by_module(adapter: Adapter, package: Package) -> Adapter:
    """The adapter with what is a packed branch's (from an `.onnx_adapter`) taken apart: a module's are the outputs of B
    and of the scale that are its own, and the ranks that reach them."""
    branches = {branch.name: branch for graph in package.manifest.graphs for branch in graph.branches}
    packed = {name: branch.modules for name, branch in branches.items() if len(branch.modules) > 1}
    deltas: dict[str, Delta | MatrixDelta] = {}
    changes: dict[str, Change] = {}
    for name, delta in adapter.deltas.items():
        sizes = [package.points[module].out_features for module in packed.get(name, ())]
        if sizes and isinstance(delta, MatrixDelta) and delta.b.shape == (sum(sizes), len(delta.a)):
            deltas.update(_apart(delta, packed[name], sizes))
        else:
            deltas[name] = delta
    for name, change in adapter.changes.items():
        sizes = [package.points[module].out_features for module in packed.get(name, ())]
        if sizes and isinstance(change, OutputScale) and change.scale.shape == (sum(sizes),):
            scales = np.split(change.scale, np.cumsum(sizes)[:-1])
            for module, scale in zip(packed[name], scales, strict=True):
                if (scale != 1).any():
                    changes[module] = OutputScale(scale)
        else:
            changes[name] = change
    return replace(adapter, deltas=deltas, changes=changes)


def _apart(delta: MatrixDelta, modules: Sequence[str], sizes: Sequence[int]) -> dict[str, MatrixDelta]:
    """A packed branch's factors by module; `sizes`: the modules' outputs."""
    apart: dict[str, MatrixDelta] = {}
    end = 0
    for module, size in zip(modules, sizes, strict=True):
        own = slice(end, end + size)
        end += size
        b = delta.b[own]
        used = np.flatnonzero(b.any(axis=0))
        scale = None if delta.output_scale is None else delta.output_scale[own]
        if used.size or (scale is not None and (scale != 1).any()):
            apart[module] = replace(delta, a=delta.a[used], b=b[:, used], output_scale=scale)
    return apart


@dataclass
class _Binder:
    adapter: Adapter
    package: Package
    tensors: dict[str, Array] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    magnitudes: dict[str, Array] = field(default_factory=dict)
    made_of: dict[str, str] = field(default_factory=dict)
    fold_only: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)  # of replaced weights and biases, by parameter
    replaced: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check_modules(self) -> None:
        points = self.package.points
        bare = {name for name in self.adapter.changes if self._is_bare(name)}
        modules = [name for name in dict.fromkeys([*self.adapter.deltas, *self.adapter.changes]) if name not in bare]
        self.problems += explain_modules([name for name in modules if name not in points], self.package)
        self.digests.update((name, points[name].sha256) for name in modules if name in points)
        both = [name for name in self.adapter.deltas if name in self.adapter.changes]
        self.problems += [
            f"{name}: has a delta and {self.adapter.changes[name].method} too, and what comes first is not told; "
            "merge one of them with PEFT"
            for name in both
        ]
        self.problems += [
            f"{name}: has {method} and a whole weight too, and of which weight that is a change is not told; merge it "
            "with PEFT"
            for name, method in self._methods().items()
            if self._is_replaced(name if name in bare else f"{name}.weight")
        ]

    def _methods(self) -> dict[str, str]:
        """Modules and parameters whose change is no sum, which another weight below it would make another."""
        deltas = self.adapter.deltas.items()
        scaled = {name: "DoRA" for name, delta in deltas if _rescales(delta)}
        return scaled | {name: change.method for name, change in self.adapter.changes.items()}

    def _is_replaced(self, parameter: str) -> bool:
        whole = self.adapter.replacements.get(parameter)
        return whole is not None and not (whole.in_place and self._is_base(parameter, whole.value))

    def bind_deltas(self) -> None:
        for module, delta in self.adapter.deltas.items():
            if module in self.package.points:
                self._bind_delta(self.package.points[module], delta)

    def _bind_delta(self, point: InjectionPoint, delta: Delta | MatrixDelta) -> None:
        wrong = delta_problems(point, delta)
        self.problems += wrong
        if wrong:
            return
        matrices = as_matrices(point, delta)
        self._put(point.lora_a, matrices.a.T[None], point.dtype)
        b = matrices.b.T
        if matrices.scale != 1.0:
            # In float64, so that scale and cast round once.
            with np.errstate(over="ignore"):
                b = b.astype(np.float64) * matrices.scale
        self._put(point.lora_b, b[None], point.dtype)
        if matrices.magnitude is not None:
            self._bind_magnitude(point, matrices.magnitude, matrices.output_scale)
        elif matrices.output_scale is not None:
            self._put_scale(point, matrices.output_scale)

    def _bind_magnitude(self, point: InjectionPoint, magnitude: Array, cached: Array | None) -> None:
        """DoRA's scale, from this package's own W0; a converted file's, where W0 is the one it was made of."""
        if cached is None or point.is_quantized or self.adapter.base_digests.get(point.module) != point.sha256:
            a, b = self.tensors[point.lora_a][0], self.tensors[point.lora_b][0]
            norms = column_norms(self.package.module_weight(point), a, b)
            if not norms.all():
                self.problems.append(
                    f"{point.module}: DoRA divides by the norms of the weight's outputs, and "
                    f"{int((norms == 0).sum())} of {norms.size} are zero"
                )
                return
            cached = np.divide(magnitude, norms, dtype=np.float64)
        self.magnitudes[point.module] = _frozen(magnitude, magnitude.dtype)
        self.made_of[point.module] = self.package.mark(point)
        self._put_scale(point, cached)

    def _put_scale(self, point: InjectionPoint, scale: Array) -> None:
        if scale.shape != (point.out_features,):
            self.problems.append(
                f"{point.module}: the scale of its outputs must have shape ({point.out_features},), "
                f"and has {scale.shape}"
            )
            return
        self._put(point.dora_scale, scale[None, None], point.dtype)
        if point.module not in self.package.dora:
            self.fold_only[point.module] = NO_SCALE

    def bind_changes(self) -> None:
        """Changes that are a pair of factors of this base, or a factor for each output, become that; the rest folds."""
        for module, change in self.adapter.changes.items():
            point = self.package.points.get(module)
            if self._is_bare(module):
                self._change_parameter(self.package.replaceable[module], change)
            if point is None or module in self.adapter.deltas:
                continue
            wrong = change.explain_misfit(point.torch_shape, point.kind)
            if wrong is None and not point.kind.foldable and not isinstance(change, OutputScale):
                wrong = f"{change.method} on {point.kind.noun} is not applied"
            if wrong is not None:
                self.problems.append(f"{module}: {wrong}")
                continue
            scale = change.output_scale()
            delta = None
            if scale is None:
                weight = point.to_torch(self.package.module_weight(point))
                delta = change.as_factors(weight.astype(np.promote_types(weight.dtype, np.float32), copy=False))
                if delta is not None and depends_on_weight(change, delta, point.torch_shape):
                    self.made_of[module] = self.package.mark(point)
            if scale is not None:
                self.problems += value_problems(f"{module}, {change.method}", scale)
                self._put_scale(point, scale)
            elif delta is not None:
                self._bind_delta(point, delta)
            else:
                self.changes[module] = change
                self.fold_only[module] = (
                    f"{change.method} changes the weight in a way that no pair of factors expresses"
                )

    def _is_bare(self, name: str) -> bool:
        """Whether it names no module but a parameter that is replaceable as it is."""
        weight = self.package.replaceable.get(name)
        return weight is not None and not weight.has_rows and name not in self.package.points

    def _change_parameter(self, weight: WholeWeight, change: Change) -> None:
        """A change of a bare parameter: its new value is an input, as any whole weight is."""
        if (wrong := change.explain_misfit(weight.shape, LINEAR)) is not None:
            self.problems.append(f"{weight.name}: {wrong}")
            return
        self.digests[weight.name] = weight.sha256
        self.replaced.append(weight.name)
        base = self.package.default(weight)
        self._put(weight.name, change.apply_to(base.astype(np.promote_types(base.dtype, np.float32))), weight.dtype)

    def bind_replacements(self) -> None:
        for name in sorted(self.adapter.replacements):
            replacement = self.adapter.replacements[name]
            if replacement.operation == "multiply" and not self._may_have(name):
                continue
            if replacement.in_place and self._is_base(name, replacement.value):
                self.notes.append(f"{name}: equal to the base's own, nothing to replace")
                continue
            if replacement.in_place and self._may_be_tied(name):
                self.problems.append(
                    f"{name}: PEFT writes it over the base's weight, and over every weight tied to that; "
                    "save the adapter with the module in modules_to_save, or merge it and export that"
                )
            self.replaced.append(name)
        known = self.package.replaceable
        self.problems += explain_parameters([name for name in self.replaced if name not in known], self.package)
        for name in self.replaced:
            if name in known and name in self.adapter.replacements:
                self._replace(known[name], self.adapter.replacements[name])

    def _may_be_tied(self, name: str) -> bool:
        """Whether another module may share the parameter's storage: by its name, or by equal values."""
        module, _, parameter = name.rpartition(".")
        equal = [self._modules_by_weight[own] - {module} for own in self._weights_by_module.get(module, ())]
        return parameter == "weight" and (module.rpartition(".")[2] in OFTEN_TIED or any(equal))

    @cached_property
    def _weights_by_module(self) -> Mapping[str, set[str]]:
        """The digests of every module's weight."""
        owners: list[InjectionPoint | WholeWeight] = [*self.package.points.values(), *self.package.replaceable.values()]
        found: dict[str, set[str]] = {}
        for owner in owners:
            if _is_weight(owner):
                found.setdefault(owner.module, set()).add(owner.sha256)
        return found

    @cached_property
    def _modules_by_weight(self) -> Mapping[str, set[str]]:
        """The modules that have a weight of this digest."""
        found: dict[str, set[str]] = {}
        for module, digests in self._weights_by_module.items():
            for own in digests:
                found.setdefault(own, set()).add(module)
        return found

    def _replace(self, weight: WholeWeight, replacement: Replacement) -> None:
        self.digests[weight.name] = weight.sha256
        value = replacement.value
        shape = weight.role.torch_shape(value.shape) if replacement.in_graph_layout else value.shape
        if shape is None or not weight.fits(shape):
            free = " (the number of outputs is free)" if weight.free_outputs else ""
            self.problems.append(f"{weight.name}: must have shape {weight.shape}{free}, and has {value.shape}")
            return
        wrong = value_problems(weight.name, value)
        if replacement.operation != "set" and shape != weight.shape:
            wrong.append(f"{weight.name}: must have the base's shape {weight.shape}, and has {value.shape}")
        self.problems += wrong
        if not wrong:
            if weight.has_rows:
                self.outputs[weight.name] = weight.role.outputs(shape)
            laid_out = value if replacement.in_graph_layout else weight.to_graph(value)
            if replacement.operation != "set":
                combine = np.add if replacement.operation == "add" else np.multiply
                laid_out = combine(self.package.default(weight), laid_out, dtype=np.float64)
            self._put(weight.name, laid_out, weight.dtype)

    def _may_have(self, name: str) -> bool:
        """Whether the base may have this bias. Of a module without one nothing is left to do."""
        module, _, parameter = name.rpartition(".")
        point = self.package.points.get(module)
        return parameter != "bias" or point is None or point.bias != "none"

    def _put(self, name: str, value: Array, dtype: str) -> None:
        """Cast and freeze one tensor."""
        cast = _frozen(value, np.dtype(dtype))
        if not np.isfinite(cast).all():
            largest = float(np.abs(value).max())
            self.problems.append(
                f"{name}: its largest value {largest:.6g} does not fit {dtype} "
                f"(at most {float(np.finfo(dtype).max):.6g}); use a package of a wider type"
            )
        self.tensors[name] = cast

    def _is_base(self, name: str, value: Array) -> bool:
        module, _, parameter = name.rpartition(".")
        owner: InjectionPoint | WholeWeight | None = self.package.replaceable.get(name)
        if owner is None and parameter == "weight":
            owner = self.package.points.get(module)
        if owner is None:
            return False
        with np.errstate(over="ignore"):
            return digest(value.astype(owner.dtype)) == owner.sha256

    def check_heads(self) -> None:
        """Weight, bias and delta of a module must agree in the number of outputs."""
        known = self.package.replaceable
        for module in sorted({name.rpartition(".")[0] for name in self.outputs}):
            now = {}
            for name in (f"{module}.weight", f"{module}.bias"):
                weight = known.get(name)
                if weight is not None and weight.has_rows:
                    whose = "the adapter" if name in self.outputs else "the base"
                    now[f"{name} ({whose}'s)"] = self.outputs.get(name, weight.outputs)
            point = self.package.points.get(module)
            if point is not None:
                now[f"the injection point {module} (export again without it in --targets)"] = point.out_features
            if len(set(now.values())) > 1:
                sizes = ", ".join(f"{size} for {what}" for what, size in now.items())
                self.problems.append(f"{module}: the number of outputs must agree, and is {sizes}")

    def check_saved_modules(self) -> None:
        names = dict.fromkeys(self.adapter.saved_modules)
        brought = matching(names, {name.rpartition(".")[0] for name in self.adapter.replacements})
        had = matching(names, self.package.modules)
        for name in names:
            if name in had and name not in brought:
                self.problems.append(
                    f"{name}: the config says that PEFT saved this module whole, the model has it, and the file "
                    "holds no tensor of it; get the whole file, or correct modules_to_save and task_type"
                )

    def check_base(self) -> None:
        known = self.adapter.base_digests
        other = [name for name, value in self.digests.items() if known and known.get(name) != value]
        points = self.package.points
        self.problems += [
            f"{module}: its tensors were made from the weights of another precision of this base; convert the adapter "
            "itself for this package"
            for module, mark in self.adapter.made_of.items()
            if module in points and self.package.mark(points[module]) != mark
        ]
        if other:
            self.problems.append(
                f"it was bound to another base: {len(other)} of {len(self.digests)} base weights differ, the first is "
                f"{other[0]}; convert the adapter again for this package, or take the package it belongs to"
            )

    def check_proven(self) -> None:
        """That the graph computes what the adapter was trained on, wherever it changes something."""
        doubts = explain_doubts(dict.fromkeys([*self.digests, *self.replaced]), self.package)
        if self.package.allow_unproven:
            self.notes += doubts
        else:
            self.problems += [f"{doubt}; {PROVE}" for doubt in doubts]

    def check_base_name(self, *, strict: bool) -> None:
        if problem := base_problem(self.adapter.origin.base_model, self.package):
            (self.problems if strict else self.notes).append(problem)

    def coverage(self) -> Coverage:
        points = self.package.points
        factors = [module for module in points if points[module].lora_a in self.tensors]
        scaled = {module for module in points if points[module].dora_scale in self.tensors}
        changed = {*factors, *scaled, *self.changes}
        applied = tuple(module for module in points if module in changed)
        silent = tuple(
            module for module in factors if module not in scaled and not self.tensors[points[module].lora_b].any()
        )
        touched = {*applied, *(name.removesuffix(".weight") for name in self.replaced)}
        if silent and len(silent) == len(applied):
            self.notes.append("every B is zero: the adapter was never trained, and its deltas change nothing")
        elif silent:
            self.notes.append(f"{len(silent)} of {len(applied)} deltas change nothing, their B is zero")
        return Coverage(
            applied=applied,
            replaced=tuple(self.replaced),
            at_base=tuple(module for module in points if module not in touched),
            silent=silent,
            ranks={module: self.tensors[points[module].lora_a].shape[2] for module in factors},
            notes=tuple(dict.fromkeys(self.notes)),
            fold_only=self.fold_only,
        )


def _rescales(delta: Delta | MatrixDelta) -> bool:
    """Whether it scales the module's outputs, beside what it adds."""
    computed = isinstance(delta, MatrixDelta) and delta.output_scale is not None
    return computed or delta.magnitude is not None


def _is_weight(owner: InjectionPoint | WholeWeight) -> bool:
    """Whether its values are a module's weight, and not a bias or a norm, which may be equal by accident."""
    return isinstance(owner, InjectionPoint) or (owner.name.endswith(".weight") and len(owner.shape) > 1)


def _frozen(value: Array, dtype: np.dtype[np.generic]) -> Array:
    """C-contiguous, of `dtype`, read-only, in memory: the value itself where it is all that."""
    value = in_memory(value)
    if value.dtype == dtype and value.flags.c_contiguous and not value.flags.writeable:
        return value
    with np.errstate(over="ignore"):
        copy: Array = np.array(value, dtype=dtype, order="C")
    copy.flags.writeable = False
    return copy
