"""Projections that one class of a model keeps in one module, and another class side by side in several: q, k and v,
gate and up. An adapter of the one class is made one of the other, exactly. It knows names, and the order of rows.

The rows of a fused weight are those of its parts, one below the other, so the parts' deltas are its delta with their A
one below the other and their B in the blocks of a diagonal; and its delta is each part's with some of the rows of B.
What is not known to be laid out so is refused by name: a fused weight's shape says nothing of its order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Change, Delta, MatrixDelta, Replacement
from onnx_lora.points import Array

if TYPE_CHECKING:
    from onnx_lora.package import Package

__all__ = ["FUSIONS", "Fusion", "Refitted", "other_classes_names", "with_package_projections"]

AnyDelta = Delta | MatrixDelta

# How many rows each part has: from the model's config and the number of all. None: the config does not say.
Sizes = Callable[[Mapping[str, Any], int], Sequence[int] | None]

_OTHER_CLASS = "export the class that the adapter was trained on, or train it on the class that was exported"


def _attention_sizes(config: Mapping[str, Any], total: int) -> Sequence[int] | None:
    """Rows of q, k and v, where each head has its own and several may share those of k and v."""
    del total
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    width = config.get("head_dim")
    if width is None and isinstance(heads, int) and heads > 0 and isinstance(config.get("hidden_size"), int):
        width = config["hidden_size"] // heads
    if not (isinstance(heads, int) and isinstance(groups, int) and isinstance(width, int)):
        return None
    return heads * width, groups * width, groups * width


def _halves(config: Mapping[str, Any], total: int) -> Sequence[int] | None:
    del config
    return [total // 2] * 2


def _thirds(config: Mapping[str, Any], total: int) -> Sequence[int] | None:
    del config
    return [total // 3] * 3


@dataclass(frozen=True)
class Fusion:
    """One module and the parts that other classes keep apart, beside it in the same module. `fused` and `parts`: the
    last parts of their names; the parts in the order of their rows. `models`: the `model_type` of the classes of either
    kind whose order that is; in others it may be another."""

    fused: str
    parts: tuple[str, ...]
    models: frozenset[str] = frozenset()
    sizes: Sizes = _halves

    @property
    def listed_parts(self) -> str:
        """For messages."""
        return f"{', '.join(self.parts[:-1])} and {self.parts[-1]}"


_QKV = ("q_proj", "k_proj", "v_proj")

# Classes whose modules such models are converted to, with the same names of what is around the projections.
_SPLIT = frozenset({"llama", "mistral"})

# From transformers 4.57, `modeling_phi3.py`: `Phi3Attention.forward`, `Phi3MLP.forward`; the latter is GLM's too. In
# Phi-4 multimodal the audio part has up before gate, so it stays out. `W_pack` is of Baichuan's own code.
FUSIONS: tuple[Fusion, ...] = (
    Fusion("qkv_proj", _QKV, _SPLIT | {"phi3"}, _attention_sizes),
    Fusion("gate_up_proj", ("gate_proj", "up_proj"), _SPLIT | {"glm", "glm4", "glm4v", "phi3"}, _halves),
    Fusion("W_pack", _QKV, _SPLIT | {"baichuan"}, _thirds),
    # Known by name alone: head by head, with q last, or otherwise from model to model.
    Fusion("Wqkv", _QKV),
    Fusion("c_attn", _QKV),
    Fusion("qkv", _QKV),
    Fusion("query_key_value", _QKV),
    Fusion("wqkv", _QKV),
)


@dataclass(frozen=True)
class _Place:
    """A fused module and its parts, of which the package has the one or the others."""

    parent: str
    fusion: Fusion

    @property
    def fused(self) -> str:
        return _join(self.parent, self.fusion.fused)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(_join(self.parent, part) for part in self.fusion.parts)

    def is_split_in(self, modules: Collection[str]) -> bool:
        return any(part in modules for part in self.parts)

    def suits(self, modules: Collection[str]) -> bool:
        """Whether `modules` has the fused module, or its parts, and not both."""
        return (self.fused in modules) != self.is_split_in(modules)


def other_classes_names(package: Package, config: Mapping[str, Any]) -> dict[str, str]:
    """Names that another class has for parts of the package's modules, or for several of them in one; by each a module
    of the package that it stands for. `config`: of the package's model."""
    model = config.get("model_type")
    found: dict[str, str] = {}
    for module in package.modules:
        for place in _places_of(module):
            if model not in place.fusion.models or not place.suits(package.modules):
                continue
            for name in (place.fused, *place.parts):
                if name not in package.modules:
                    found[name] = module
    return found


def _places_of(module: str) -> list[_Place]:
    """The places that a module may be the fused one of, or a part."""
    parent, _, last = module.rpartition(".")
    return [_Place(parent, fusion) for fusion in FUSIONS if last in (fusion.fused, *fusion.parts)]


def _join(parent: str, last: str) -> str:
    return f"{parent}.{last}" if parent else last


# --- making an adapter of one class one of the other --------------------------------------------


@dataclass(frozen=True)
class Refitted:
    """An adapter for the modules that a package has. What cannot be made one of these is left out of `adapter`, and
    `problems` say why."""

    adapter: Adapter
    problems: tuple[str, ...] = ()


def with_package_projections(adapter: Adapter, package: Package, config: Mapping[str, Any]) -> Refitted:
    """The adapter with deltas for the package's fused modules in the place of those for their parts, or the reverse.
    `config`: of the package's model."""
    places = _places_in(adapter, package)
    if not places:
        return Refitted(adapter)
    refit = _Refit(adapter, package, config)
    for place in places:
        refit.put(place)
    return refit.finish()


def _places_in(adapter: Adapter, package: Package) -> list[_Place]:
    """Where the adapter has the parts of what the package has fused, or the reverse; each once, in its order."""
    names = [*adapter.deltas, *adapter.changes]
    names.extend(name.rpartition(".")[0] for name in adapter.replacements)
    found: dict[_Place, None] = {}
    for name in dict.fromkeys(names):
        if name in package.modules:
            continue
        for place in _places_of(name):
            if place.suits(package.modules):
                found[place] = None
    return list(found)


class _NotExactError(Exception):
    """Why what an adapter has at a place cannot be applied to the other class."""


@dataclass
class _Refit:
    """One adapter, place by place. `unknown`: by fused name, the modules at places of an unknown order."""

    adapter: Adapter
    package: Package
    config: Mapping[str, Any]
    deltas: dict[str, AnyDelta] = field(init=False)
    changes: dict[str, Change] = field(init=False)
    replacements: dict[str, Replacement] = field(init=False)
    problems: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    unknown: dict[Fusion, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deltas = dict(self.adapter.deltas)
        self.changes = dict(self.adapter.changes)
        self.replacements = dict(self.adapter.replacements)

    def put(self, place: _Place) -> None:
        """Replace what the adapter has at the place by what the package has modules for."""
        is_fused_here = place.fused in self.package.modules
        own = place.parts if is_fused_here else (place.fused,)
        deltas, others = self._take(own)
        if self.config.get("model_type") not in place.fusion.models:
            self.unknown.setdefault(place.fusion, []).extend([*deltas, *others])
            return
        try:
            self._must_be_deltas(place, others)
            made = self._fuse(place, deltas) if is_fused_here else self._split(place, deltas[place.fused])
            self._must_be_alone(made)
        except _NotExactError as error:
            self.problems.append(str(error))
            return
        self.deltas.update(made)
        fusion = place.fusion
        if is_fused_here:
            note = f"{fusion.listed_parts} are parts of one module of this package, {fusion.fused}"
        else:
            note = f"{fusion.fused} is in this package {fusion.listed_parts}, each with its rows of B"
        self.notes[note] = None

    def _take(self, modules: Collection[str]) -> tuple[dict[str, AnyDelta], list[str]]:
        """The deltas of these modules; and what else there is of them, as messages call it. All are taken out."""
        deltas = {name: self.deltas.pop(name) for name in modules if name in self.deltas}
        others: list[str] = []
        for name in modules:
            change = self.changes.pop(name, None)
            if change is not None:
                others.append(f"{name} ({change.method})")
        for name in list(self.replacements):
            if name.rpartition(".")[0] in modules:
                del self.replacements[name]
                others.append(name)
        return deltas, others

    def _must_be_deltas(self, place: _Place, others: Sequence[str]) -> None:
        if others:
            here = place.fusion.fused if place.fused in self.package.modules else place.fusion.listed_parts
            raise _NotExactError(
                f"{', '.join(others)}: the package has {here} there, to which only LoRA and DoRA are taken over; "
                f"{_OTHER_CLASS}"
            )

    def _must_be_alone(self, made: Iterable[str]) -> None:
        for name in made:
            if name in self.deltas or name in self.changes:
                raise _NotExactError(
                    f"{name}: the adapter has it fused and in parts too; take one of them out of the file"
                )

    def _fuse(self, place: _Place, deltas: Mapping[str, AnyDelta]) -> dict[str, AnyDelta]:
        """The delta of the fused module, made of those of parts. Parts without one stay as they are."""
        point = self.package.points.get(place.fused)
        if point is None:
            # Any delta does: `bind` refuses a module without a point, and says how to get one.
            return {place.fused: next(iter(deltas.values()))}
        sizes = self._sizes(place, point.out_features)
        for part, size in zip(place.parts, sizes, strict=True):
            if part in deltas:
                _must_fit(part, deltas[part], (size, point.in_features))
        return {place.fused: _fuse_deltas(place, sizes, deltas)}

    def _split(self, place: _Place, delta: AnyDelta) -> dict[str, AnyDelta]:
        """The deltas of the parts: all have A, and each has its own rows of B."""
        _must_fit(place.fused, delta, None)
        sizes = self._sizes(place, len(delta.b))
        ends = np.cumsum(sizes)[:-1]
        blocks = np.split(delta.b, ends)
        magnitudes = [None] * len(blocks) if delta.magnitude is None else np.split(delta.magnitude, ends)
        made: dict[str, AnyDelta] = {}
        for part, b, magnitude in zip(place.parts, blocks, magnitudes, strict=True):
            used = np.flatnonzero(b.any(axis=0))
            # Of an adapter that was fused out of parts, each has ranks of its own.
            ranks = used if used.size else np.arange(b.shape[1])
            made[part] = Delta(delta.a[ranks], b[:, ranks], delta.scale, magnitude=magnitude)
        return made

    def _sizes(self, place: _Place, total: int) -> Sequence[int]:
        """The rows of each part, `total` in all."""
        sizes = place.fusion.sizes(self.config, total)
        if sizes is None or sum(sizes) != total:
            found = "it does not say" if sizes is None else f"by it they have {' + '.join(map(str, sizes))}"
            raise _NotExactError(
                f"{place.fused}: the package's config.json must say how many of its {total} outputs are those of "
                f"{place.fusion.listed_parts}, and {found}; put the model's own config.json there, or {_OTHER_CLASS}"
            )
        return sizes

    def finish(self) -> Refitted:
        for fusion, names in self.unknown.items():
            self.problems.append(self._explain_unknown(fusion, names))
        adapter = replace(
            self.adapter,
            deltas=self.deltas,
            changes=self.changes,
            replacements=self.replacements,
            notes=(*self.adapter.notes, *self.notes),
        )
        return Refitted(adapter, tuple(self.problems))

    def _explain_unknown(self, fusion: Fusion, names: Sequence[str]) -> str:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        model = self.config.get("model_type")
        of_model = f"models of type {model!r}" if isinstance(model, str) else "models whose config.json says no type"
        return (
            f"{names[0]}{more}: one of package and adapter has {fusion.fused} and the other {fusion.listed_parts}, and "
            f"how {of_model} order the outputs of {fusion.fused} is not known here; {_OTHER_CLASS}"
        )


def _must_fit(name: str, delta: AnyDelta, shape: tuple[int, int] | None) -> None:
    """Raises _NotExactError: the factors are no pair of a linear module `[out, in]`. shape: None for any."""
    a, b = delta.a, delta.b
    is_pair = a.ndim == b.ndim == 2 and len(a) == b.shape[1] >= 1
    fits = shape is None or (len(b), *a.shape[1:]) == shape
    has_scale = isinstance(delta, MatrixDelta) and delta.output_scale is not None
    magnitude = delta.magnitude
    fits_magnitude = magnitude is None or magnitude.shape == b.shape[:1]
    if is_pair and fits and fits_magnitude and not has_scale:
        return
    wanted = "a pair of factors" if shape is None else f"factors for {shape[1]} inputs and {shape[0]} outputs"
    shapes = f"A {a.shape} and B {b.shape}"
    if magnitude is not None:
        shapes += f", DoRA's magnitude {magnitude.shape}"
    if has_scale:
        shapes += ", and a scale of its outputs, as a converted file has it; take the adapter that it was made of"
    raise _NotExactError(f"{name}: must have {wanted}, and has {shapes}")


def _fuse_deltas(place: _Place, sizes: Sequence[int], deltas: Mapping[str, AnyDelta]) -> Delta:
    """Deltas of parts as one of the fused module, ranks added.

    Raises _NotExactError: some have DoRA's magnitude and some have none, so that nothing says the norms of those.
    """
    having = [deltas[part] for part in place.parts if part in deltas]
    magnitudes = [delta.magnitude for delta in having if delta.magnitude is not None]
    if magnitudes and len(magnitudes) < len(place.parts):
        parts = ", ".join(place.parts)
        raise _NotExactError(
            f"{parts}: DoRA on one of them needs DoRA on all, because the package has them in one module; "
            f"{_OTHER_CLASS}"
        )
    scales = {delta.scale for delta in having}
    scale = scales.pop() if len(scales) == 1 else 1.0
    b = np.zeros((sum(sizes), sum(delta.rank for delta in having)), np.result_type(*_blocks(having, scale)))
    rank = row = 0
    for part, size in zip(place.parts, sizes, strict=True):
        if part in deltas:
            [block] = _blocks([deltas[part]], scale)
            b[row : row + size, rank : rank + block.shape[1]] = block
            rank += block.shape[1]
        row += size
    a = np.concatenate([delta.a for delta in having])
    return Delta(a, b, scale, magnitude=np.concatenate(magnitudes) if magnitudes else None)


def _blocks(deltas: Iterable[AnyDelta], scale: float) -> list[Array]:
    """B of each, with what `scale` lacks of its own scale multiplied in, in float64, so that it is rounded only once:
    when it is bound."""
    blocks: list[Array] = []
    for delta in deltas:
        blocks.append(delta.b if delta.scale == scale else delta.b.astype(np.float64) * delta.scale)
    return blocks
