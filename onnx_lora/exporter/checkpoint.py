"""The weights of a checkpoint by their torch names, and finding a graph's weight among them by
its values. It reads a torch model or a folder of safetensors; it knows no graph."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from onnx_lora.errors import ModelError
from onnx_lora.json_file import read_json
from onnx_lora.kinds import Conv, Embedding, Kind, Linear
from onnx_lora.package import Package
from onnx_lora.points import Array, Bias, InjectionPoint, WholeWeight
from onnx_lora.roles import LinearWeight

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["NEVER_CALLED", "Checkpoint", "Match", "overridden", "scaled_axis"]

# Why `nn.MultiheadAttention`'s `out_proj` gets no point.
NEVER_CALLED = "nn.MultiheadAttention reads its weight and never calls it, so PEFT has no effect there"

# An index of shards has 100 bytes for each tensor: this is one of 600,000.
_INDEX_LIMIT = 64 * 2**20  # bytes

_ALL = (slice(None), slice(None))
_FIRST_ROW = (slice(0, 1), slice(None))
_FIRST_COLUMN = (slice(None), slice(0, 1))

# A first row farther than this belongs to another module: of an unrelated one it is 1.4 norms away. A row of
# small numbers may be rounded to zero.
_FIRST_ROW_NEAR = 1.0

# A weight's inputs, or outputs, count as scaled where the scales are so many times further from 1 (mean square) than
# what they leave unexplained would put them, and that is no larger part of the whole (a sum of squares: rounding to 4
# bits leaves a hundredth).
_SCALED_FURTHER = 4.0
_SCALED_REST = 0.25

# The axes of `[in, out]` that scales may lie along, and the axis that each is summed over.
_AXES: Mapping[Literal["inputs", "outputs"], int] = {"inputs": 1, "outputs": 0}


@dataclass(frozen=True, slots=True)
class Match:
    """A checkpoint's module whose weight a graph holds: its outputs `start` to `start + outputs` are the
    module's from `first` on, of `size` in all.

    `in_out`: torch keeps this weight `[in, out]` (transformers' Conv1D, embeddings), not `[out, in]`. `read` gives it
    whole. `bias`: whether the module has one.
    """

    module: str
    start: int
    outputs: int
    in_out: bool
    first: int
    size: int
    read: Callable[[], Array]
    bias: Bias = "unknown"


# Whether torch may keep a weight of a kind `[in, out]`: transformers' Conv1D does.
_LAYOUTS: Mapping[type[Kind], tuple[bool, ...]] = {Linear: (False, True), Embedding: (True,), Conv: (False,)}


@dataclass(frozen=True)
class _Weight:
    """One parameter, a convolution's as `[out, channels · kernel]`, read only when asked for.

    `kind` is None where only its axes are known: linear, or an embedding.
    """

    module: str
    shape: tuple[int, int]
    read: Callable[[tuple[slice, slice]], Array]
    kind: type[Kind] | None = None
    bias: Bias = "unknown"

    def layouts(self, kind: type[Kind]) -> tuple[bool, ...]:
        """Whether torch may keep it `[in, out]`, if it is a module of this kind; nothing if it is none."""
        if self.kind not in (None, kind):
            return ()
        return _LAYOUTS[kind]


@dataclass(frozen=True)
class Checkpoint:
    """Every `.weight` of a model with two axes or more, by its module's torch name, read only when asked for.

    `heads` are the output layers that "all-linear" leaves out. None: the checkpoint is only a file,
    which says neither what is an output layer nor what is linear and what an embedding. `names`: of
    all tensors, where they are known. `refused`: modules with a weight that must not have LoRA here, and why.
    """

    weights: tuple[_Weight, ...]
    modules: frozenset[str]
    heads: frozenset[str] | None = None
    names: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of_module(model: nn.Module, *, heads: frozenset[str]) -> Checkpoint:
        """The modules of a torch model that can have LoRA: `nn.Linear`, transformers' `Conv1D`, convolutions and
        embeddings."""
        weights = []
        refused: dict[str, str] = {}
        elsewhere = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        for name, module in model.named_modules():
            kind = _kind_of(module)
            if kind is None:
                continue
            reason = _refusal(module, kind)
            if elsewhere[id(module)] > 1:
                reason = "PEFT wraps a module under its first name only: by others it is called without the adapter"
            if reason is not None:
                refused[name] = reason
                continue
            weight = module.weight
            shape = int(weight.shape[0]), math.prod(weight.shape[1:])
            bias: Bias = "none" if getattr(module, "bias", None) is None else "added"
            weights.append(_Weight(name, shape, partial(_read_tensor, weight), kind, bias))
        return Checkpoint(tuple(weights), frozenset(weight.module for weight in weights), heads, refused=refused)

    @staticmethod
    def of_folder(folder: Path) -> Checkpoint:
        """The weights of a folder with `model.safetensors`, or its shards and their index.

        Raises ModelError: there are none, or they are damaged.
        """
        # Kept open: opening reads the header, which names every tensor.
        shapes: dict[str, tuple[Any, list[int]]] = {}
        for file in _safetensors_files(folder):
            try:
                opened: Any = safe_open(str(file), framework="numpy")
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    shapes[key] = opened, opened.get_slice(key).get_shape()
            except (SafetensorError, OSError) as error:
                raise ModelError(f"must be a safetensors file: {error}", path=file) from error
        weights: list[_Weight] = []
        for key, (opened, shape) in shapes.items():
            if key.endswith(".weight") and len(shape) > 1 and not _is_never_called(key, shapes):
                module = key.removesuffix(".weight")
                kind = Conv if len(shape) > 2 else None
                bias: Bias = "added" if f"{module}.bias" in shapes else "none"
                rows = shape[0], math.prod(shape[1:])
                weights.append(_Weight(module, rows, partial(_read_opened, opened, key), kind, bias))
        modules = frozenset(weight.module for weight in weights)
        return Checkpoint(tuple(weights), modules, names=frozenset(shapes))

    @staticmethod
    def of_package(package: Package) -> Checkpoint:
        """The weights of a package's points, and those that it lets adapters replace."""
        weights: list[_Weight] = []
        for name, point in package.points.items():
            inputs, outputs = point.kind.weight_inputs(point.in_features), point.out_features
            shape = (inputs, outputs) if isinstance(point.kind, Embedding) else (outputs, inputs)
            weights.append(_Weight(name, shape, partial(_read_point, package, point), type(point.kind), point.bias))
        for weight in package.replaceable.values():
            if isinstance(weight.role, LinearWeight) and weight.module not in package.points:
                _, inputs, outputs = weight.graph_shape
                read = partial(_read_replaceable, package, weight)
                weights.append(_Weight(weight.module, (outputs, inputs), read, Linear))
        # Not None: the modules are known to be linear, whatever else reads an equal weight.
        return Checkpoint(tuple(weights), frozenset(weight.module for weight in weights), frozenset())

    def find(self, weight: Array, kind: type[Kind] = Linear, *, within: float = 0.0) -> list[list[Match]]:
        """Every way to read `weight` `[in, out]` as one module's of a kind, or several linear ones packed side by side.

        Compared in the graph's type, bit for bit; a quantized weight by its distance, which may be so many times
        the norm of the checkpoint's. Usually one way; none where the graph's weight is not the
        checkpoint's; several where modules hold equal values.
        """
        same = _comparison(within)
        matches = self._at(weight, 0, same, kind)
        whole = {match.module: [match] for match in matches if match.outputs == weight.shape[1]}
        if whole or kind is not Linear:
            return list(whole.values())
        return list(self._packed(weight, 0, (), same))

    def matrices(self, module: str) -> Iterator[Array]:
        """A module's weight as `[in, out]`, in every layout that torch may keep it in."""
        for weight in self.weights:
            if weight.module == module:
                values = weight.read(_ALL).astype(np.float32, copy=False)
                yield values.T
                yield values

    def find_piece(self, weight: Array, guess: str, *, within: float = 0.0) -> list[list[Match]]:
        """Every way to read `weight` `[in, out]` as some of one module's outputs: gate and up of one weight.

        Looked for among modules of the layer that the node's name `guess` counts.
        """
        same, alike = _comparison(within), _comparison(within and _FIRST_ROW_NEAR)
        first, last = weight[:, 0], weight[:, -1]
        found: list[list[Match]] = []
        for candidate in self.weights:
            if re.findall(r"\d+", candidate.module) != re.findall(r"\d+", guess):
                continue
            for in_out in candidate.layouts(Linear):
                inputs, outputs = candidate.shape if in_out else candidate.shape[::-1]
                if inputs != weight.shape[0] or outputs <= weight.shape[1]:
                    continue
                values = _by_output(candidate, in_out, weight.dtype)
                for begin in range(outputs - weight.shape[1] + 1):
                    end = begin + weight.shape[1]
                    ends = alike(values[begin], first) and alike(values[end - 1], last)
                    if ends and same(values[begin:end], weight.T):
                        read = partial(candidate.read, _ALL)
                        match = Match(
                            candidate.module, 0, weight.shape[1], in_out, begin, outputs, read, candidate.bias
                        )
                        found.append([match])
        return found

    def _packed(self, weight: Array, start: int, before: tuple[Match, ...], same: _Same) -> Iterator[list[Match]]:
        """Every way to go on behind `before` with modules that were not used yet."""
        if start == weight.shape[1]:
            yield list(before)
            return
        used = {match.module for match in before}
        for match in self._at(weight, start, same):
            if match.module not in used:
                yield from self._packed(weight, start + match.outputs, (*before, match), same)

    def _at(self, weight: Array, start: int, same: _Same, kind: type[Kind] = Linear) -> Iterator[Match]:
        """Modules whose weight is `weight[:, start : start + their outputs]`."""
        first = np.ascontiguousarray(weight[:, start])
        for candidate, in_out in self._starting_with(first, same):
            outputs = candidate.shape[1 if in_out else 0]
            if start + outputs > weight.shape[1] or in_out not in candidate.layouts(kind):
                continue
            if same(_by_output(candidate, in_out, weight.dtype), weight[:, start : start + outputs].T):
                read = partial(candidate.read, _ALL)
                yield Match(candidate.module, start, outputs, in_out, 0, outputs, read, candidate.bias)

    def _starting_with(self, first: Array, same: _Same) -> Iterator[tuple[_Weight, bool]]:
        """Weights whose first output's weights are `first`, and whether they are kept `[in, out]`."""
        index = self._index(first.dtype)
        if same is _equal:
            yield from index.get((first.size, first.tobytes()), ())
            return
        for (size, data), candidates in index.items():
            if size == first.size and _near(np.frombuffer(data, first.dtype), first, _FIRST_ROW_NEAR):
                yield from candidates

    def _index(self, dtype: np.dtype[np.generic]) -> Mapping[tuple[int, bytes], list[tuple[_Weight, bool]]]:
        """Weights by the weights of their first output, for both of torch's layouts."""
        if dtype.name not in self._indices:
            index: dict[tuple[int, bytes], list[tuple[_Weight, bool]]] = defaultdict(list)
            for weight in self.weights:
                if 0 in weight.shape:
                    continue
                for in_out, first in ((False, _FIRST_ROW), (True, _FIRST_COLUMN)):
                    key = weight.read(first).astype(dtype).ravel()
                    index[key.size, key.tobytes()].append((weight, in_out))
            self._indices[dtype.name] = index
        return self._indices[dtype.name]

    @cached_property
    def _indices(self) -> dict[str, dict[tuple[int, bytes], list[tuple[_Weight, bool]]]]:
        return {}


def _equal(values: Array, weight: Array) -> bool:
    return np.array_equal(values, weight)


def _near(values: Array, weight: Array, within: float) -> bool:
    wanted, found = values.astype(np.float32, copy=False), weight.astype(np.float32, copy=False)
    return bool(np.linalg.norm(wanted - found) <= within * np.linalg.norm(wanted))


def _comparison(within: float) -> _Same:
    return partial(_near, within=within) if within else _equal


# Whether a checkpoint's weights are those of a graph.
_Same = Callable[[Array, Array], bool]


def _by_output(weight: _Weight, in_out: bool, dtype: np.dtype[np.generic]) -> Array:
    """The whole weight as `[out, in]`."""
    values = weight.read(_ALL).astype(dtype, copy=False)
    return values.T if in_out else values


def scaled_axis(weight: Array, reference: Array) -> Literal["inputs", "outputs"] | None:
    """Which axis of `reference` `[in, out]` was multiplied by scales that explain `weight`, as far as rounding lets
    that be told; None: neither."""
    wide: NDArray[np.float64] = weight.astype(np.float64)
    known: NDArray[np.float64] = reference.astype(np.float64)
    explained: dict[Literal["inputs", "outputs"], float] = {}
    for name, along in _AXES.items():
        squares = np.square(known).sum(axis=along)
        if not squares.all():
            continue
        scales = (wide * known).sum(axis=along) / squares
        rest = np.square(wide - known * np.expand_dims(scales, along))
        errors = rest.sum(axis=along) / known.shape[along] / squares  # squares of the standard errors of scales
        if np.square(scales - 1.0).mean() > _SCALED_FURTHER * errors.mean():
            explained[name] = float(rest.sum())
    best = min(explained, key=lambda name: explained[name], default=None)
    whole = np.square(wide).sum()
    return best if best is not None and explained[best] < _SCALED_REST * whole else None


def _is_never_called(key: str, others: Collection[str]) -> bool:
    """Whether a weight is `nn.MultiheadAttention`'s `out_proj`, which it reads and never calls: PEFT has no effect."""
    parent, _, name = key.removesuffix(".weight").rpartition(".")
    beside = {f"{parent}.{what}".lstrip(".") for what in ("in_proj_weight", "in_proj_bias")}
    return name == "out_proj" and not beside.isdisjoint(others)


# What torch's and transformers' own classes compute with their weight.
_KINDS: Mapping[str, type[Kind]] = {
    "Linear": Linear,
    "Conv1D": Linear,
    "Conv1d": Conv,
    "Conv2d": Conv,
    "Conv3d": Conv,
    "Embedding": Embedding,
}


def _kind_of(module: nn.Module) -> type[Kind] | None:
    """By name, along the classes it inherits from: torch is not needed to attach points to a file."""
    plain = _plain_class(module)
    return None if plain is None else _KINDS[plain.__name__]


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in type(module).__mro__ if kind.__name__ in _KINDS), None)


def overridden(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's or transformers' whose forward a module has replaced by its own; None where it has not.

    PEFT adds its delta behind all of that, of which the graph shows only parts.
    """
    plain = _plain_class(module)
    # PEFT knows of one thing that a class of embeddings adds: a scale.
    if plain is None or (plain.__name__ == "Embedding" and hasattr(module, "embed_scale")):
        return None
    return None if type(module).forward is plain.forward and "forward" not in vars(module) else plain


def _refusal(module: nn.Module, kind: type[Kind]) -> str | None:
    """Why PEFT's delta beside a module's product would be something else than PEFT's delta beside the module, or
    None."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "a hook may change what it takes in or gives"
    if "NonDynamicallyQuantizableLinear" in (kind.__name__ for kind in type(module).__mro__):
        return NEVER_CALLED
    if kind is Conv and getattr(type(module), "_conv_forward", None) is not vars(_plain_class(module)).get(
        "_conv_forward"
    ):
        return f"{type(module).__name__} convolves in a way of its own"
    if kind is Conv and getattr(module, "padding_mode", "zeros") != "zeros":
        return f"it pads with {getattr(module, 'padding_mode', '')} values, and PEFT's A beside it with zeros"
    if kind is Embedding and getattr(module, "max_norm", None) is not None:
        return "with max_norm PEFT renormalises A's rows too"
    return None


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index, ModelError, what="an index of safetensors shards", limit=_INDEX_LIMIT)
        places = content.get("weight_map")
        if not isinstance(places, dict):
            raise ModelError("must be an index of safetensors shards, with a weight_map", path=index)
        files = [folder / Path(name).name for name in sorted(set(map(str, places.values())))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"the checkpoint lacks {', '.join(missing)}", path=folder)
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError("a checkpoint must be a folder with .safetensors weights", path=folder)
    return files


def _read_tensor(tensor: torch.Tensor, part: tuple[slice, slice]) -> Array:
    values = tensor.detach().flatten(1)[part]
    # numpy has no bfloat16; float32 holds each of its values exactly.
    array: Array = (values.float() if str(values.dtype) == "torch.bfloat16" else values).cpu().numpy()
    return array


def _read_point(package: Package, point: InjectionPoint, part: tuple[slice, slice]) -> Array:
    weight = package.module_weight(point)
    values: Array = (weight if isinstance(point.kind, Embedding) else weight.T)[part]
    return values


def _read_replaceable(package: Package, weight: WholeWeight, part: tuple[slice, slice]) -> Array:
    values: Array = package.default(weight)[0].T[part]
    return values


def _read_opened(opened: Any, key: str, part: tuple[slice, slice]) -> Array:
    rows: Array = opened.get_slice(key)[part[0]]
    values = rows.reshape(len(rows), -1)[:, part[1]]
    return values.astype(np.float32) if values.dtype == ml_dtypes.bfloat16 else values
