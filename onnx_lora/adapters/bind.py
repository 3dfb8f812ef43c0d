"""An adapter checked against a package, once and for all, and laid out as its graph's inputs.

It knows points and replaceable weights, and no file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_lora.adapters.model import Adapter, BoundAdapter, Coverage, Delta, Replacement
from onnx_lora.adapters.unknown import explain_modules, explain_parameters
from onnx_lora.errors import BindError
from onnx_lora.package import Package
from onnx_lora.points import Array, InjectionPoint, Replaceable, digest, matches

__all__ = ["bind"]

# Modules whose weight is often one storage with another's: input embeddings and the output head.
_OFTEN_TIED = frozenset({"embed_in", "embed_out", "embed_tokens", "lm_head", "shared", "word_embeddings", "wte"})


def bind(adapter: Adapter, package: Package) -> BoundAdapter:
    """Check `adapter` against `package` and lay it out.

    Raises BindError: every reason why it cannot be applied exactly.
    """
    adapter = replace(adapter, deltas=_by_module(adapter.deltas, package))
    binder = _Binder(adapter, package, notes=list(adapter.notes))
    binder.bind_deltas()
    binder.bind_replacements()
    binder.check_heads()
    binder.check_saved_modules()
    binder.check_base()
    if not adapter.deltas and not adapter.replacements:
        binder.problems.append("it holds nothing: there must be at least one delta or one whole weight")
    if binder.problems:
        raise BindError(
            f"adapter {adapter.name!r} does not fit the package {package.path}",
            path=adapter.origin.path,
            problems=binder.problems,
        )
    graphs = package.manifest.graphs
    return BoundAdapter(adapter.name, binder.tensors, binder.coverage(), adapter.origin, binder.digests, graphs)


def _by_module(deltas: Mapping[str, Delta], package: Package) -> dict[str, Delta]:
    """The deltas, those of a packed branch (from an `.onnx_adapter`) taken apart: a module's are the outputs of B
    that are its own, and the ranks that reach them."""
    branches = {branch.name: branch for graph in package.manifest.graphs for branch in graph.branches}
    apart: dict[str, Delta] = {}
    for name, delta in deltas.items():
        modules = branches[name].modules if name in branches else ()
        sizes = [package.points[module].out_features for module in modules]
        if len(modules) < 2 or delta.b.ndim != 2 or delta.a.ndim != 2 or delta.b.shape != (sum(sizes), len(delta.a)):
            apart[name] = delta
            continue
        ends = np.cumsum(sizes)
        for module, end, size in zip(modules, ends, sizes, strict=True):
            b = delta.b[end - size : end]
            used = np.flatnonzero(b.any(axis=0))
            if used.size:
                apart[module] = Delta(delta.a[used], b[:, used], delta.scale)
    return apart


@dataclass
class _Binder:
    adapter: Adapter
    package: Package
    tensors: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)  # of replaced weights and biases, by parameter
    replaced: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def bind_deltas(self) -> None:
        points = self.package.points
        self.problems += explain_modules([name for name in self.adapter.deltas if name not in points], self.package)
        for module, delta in self.adapter.deltas.items():
            point = points.get(module)
            if point is None:
                continue
            self.digests[module] = point.sha256
            wrong = _delta_problems(point, delta)
            self.problems += wrong
            if not wrong:
                self._put(point.lora_a, delta.a.T[None], point.dtype)
                # In float64, so that scale and cast round once.
                with np.errstate(over="ignore"):
                    scaled = delta.b.T if delta.scale == 1.0 else delta.b.T.astype(np.float64) * delta.scale
                self._put(point.lora_b, scaled[None], point.dtype)

    def bind_replacements(self) -> None:
        for name in sorted(self.adapter.replacements):
            replacement = self.adapter.replacements[name]
            if replacement.in_place and self._is_base(name, replacement.value):
                self.notes.append(f"{name}: equal to the base's own, nothing to replace")
                continue
            if replacement.in_place and name.rpartition(".")[0].rpartition(".")[2] in _OFTEN_TIED:
                self.problems.append(
                    f"{name}: PEFT writes it over the base's weight, and over every weight tied to that; "
                    "save the adapter with the module in modules_to_save, or merge it and export that"
                )
            self.replaced.append(name)
        known = self.package.replaceable
        self.problems += explain_parameters([name for name in self.replaced if name not in known], self.package)
        for name in self.replaced:
            if name in known:
                self._replace(known[name], self.adapter.replacements[name])

    def _replace(self, weight: Replaceable, replacement: Replacement) -> None:
        self.digests[weight.name] = weight.sha256
        value = replacement.value
        shape = _torch_shape(weight, value.shape) if replacement.in_graph_layout else value.shape
        if shape is None or not weight.fits(shape):
            free = " (the number of outputs is free)" if weight.free_outputs else ""
            self.problems.append(f"{weight.name}: must have shape {weight.shape}{free}, and has {value.shape}")
            return
        wrong = _value_problems(weight.name, value)
        self.problems += wrong
        if not wrong:
            if weight.role != "whole":
                self.outputs[weight.name] = shape[-1 if weight.in_out else 0]
            self._put(weight.name, value if replacement.in_graph_layout else weight.to_graph(value), weight.dtype)

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
        owner: InjectionPoint | Replaceable | None = self.package.replaceable.get(name)
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
                if weight is not None and weight.role != "whole":
                    own = weight.shape[-1 if weight.in_out else 0]
                    now[f"{name} ({'the adapter' if name in self.outputs else 'the base'}'s)"] = self.outputs.get(
                        name, own
                    )
            point = self.package.points.get(module)
            if point is not None:
                now[f"the injection point {module} (export again without it in --targets)"] = point.out_features
            if len(set(now.values())) > 1:
                sizes = ", ".join(f"{size} for {what}" for what, size in now.items())
                self.problems.append(f"{module}: the number of outputs must agree, and is {sizes}")

    def check_saved_modules(self) -> None:
        modules = {name.rpartition(".")[0] for name in self.package.replaceable} | set(self.package.points)
        modules |= {module for graph in self.package.manifest.graphs for module in graph.untargeted}
        brought = {name.rpartition(".")[0] for name in self.adapter.replacements}
        for name in dict.fromkeys(self.adapter.saved_modules):
            if not any(matches(module, [name]) for module in brought) and any(
                matches(module, [name]) for module in modules
            ):
                self.problems.append(
                    f"{name}: the config says that PEFT saved this module whole, the model has it, and the file "
                    "holds no tensor of it; get the whole file, or correct modules_to_save and task_type"
                )

    def check_base(self) -> None:
        known = self.adapter.base_digests
        other = [name for name, value in self.digests.items() if known.get(name, value) != value]
        if other:
            self.problems.append(
                f"it was bound to another base: {len(other)} of {len(self.digests)} base weights differ, the first is "
                f"{other[0]}; convert the adapter again for this package, or take the package it belongs to"
            )

    def coverage(self) -> Coverage:
        points = self.package.points
        applied = tuple(module for module in points if module in self.adapter.deltas)
        silent = tuple(module for module in applied if not self.tensors[points[module].lora_b].any())
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
            ranks={module: self.tensors[points[module].lora_a].shape[2] for module in applied},
            notes=tuple(dict.fromkeys(self.notes)),
        )


def _delta_problems(point: InjectionPoint, delta: Delta) -> list[str]:
    a, b, name = delta.a, delta.b, point.module
    if a.ndim != 2 or b.ndim != 2:
        return [f"{name}: lora_A and lora_B must have 2 axes, and have shapes {a.shape} and {b.shape}"]
    problems: list[str] = []
    if a.shape[1] != point.in_features:
        problems.append(f"{name}: lora_A must have {point.in_features} inputs, and has {a.shape[1]} (shape {a.shape})")
    if b.shape[0] != point.out_features:
        problems.append(
            f"{name}: lora_B must have {point.out_features} outputs, and has {b.shape[0]} (shape {b.shape})"
        )
    if a.shape[0] != b.shape[1] or a.shape[0] < 1:
        problems.append(f"{name}: the ranks must agree and be at least 1, and are {a.shape[0]} and {b.shape[1]}")
    if not np.isfinite(delta.scale):
        problems.append(f"{name}: the scale must be finite, and is {delta.scale}")
    return problems + _value_problems(f"{name}.lora_A.weight", a) + _value_problems(f"{name}.lora_B.weight", b)


def _value_problems(name: str, value: Array) -> list[str]:
    if value.dtype.kind != "f":
        return [f"{name}: must be floating point, and is {value.dtype.name}"]
    bad = value.size - int(np.isfinite(value).sum())
    return [f"{name}: {bad} of {value.size} values are NaN or infinite; train or save it again"] if bad else []


def _torch_shape(weight: Replaceable, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the torch parameter behind a graph input's value with one row."""
    if weight.role == "whole":
        return shape
    if len(shape) != 3 or shape[0] != 1 or (weight.role == "linear_bias" and shape[1] != 1):
        return None
    if weight.role == "linear_bias":
        return shape[2:]
    return shape[1:] if weight.in_out else (shape[2], shape[1])


def _frozen(value: Array, dtype: np.dtype[np.generic]) -> Array:
    """C-contiguous, of `dtype`, read-only: the value itself where it is all that."""
    if value.dtype == dtype and value.flags.c_contiguous and not value.flags.writeable:
        return value
    with np.errstate(over="ignore"):
        copy: Array = np.array(value, dtype=dtype, order="C")
    copy.flags.writeable = False
    return copy
