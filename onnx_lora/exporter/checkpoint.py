"""The weights of a checkpoint by their torch names, and finding a graph's weight among them by
its values. It reads a torch model or a folder of safetensors; it knows no graph."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from onnx_lora.errors import ModelError
from onnx_lora.package import Package
from onnx_lora.points import Array, Bias, InjectionPoint, Kind, Replaceable

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Checkpoint", "Match"]

_ALL = (slice(None), slice(None))
_FIRST_ROW = (slice(0, 1), slice(None))
_FIRST_COLUMN = (slice(None), slice(0, 1))

# A first row farther than this belongs to another module: of an unrelated one it is 1.4 norms away. A row of
# small numbers may be rounded to zero.
_FIRST_ROW_NEAR = 1.0


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


@dataclass(frozen=True)
class _Weight:
    """One parameter, a convolution's as `[out, channels · kernel]`, read only when asked for.

    `kind` is None where only its axes are known: linear, or an embedding.
    """

    module: str
    shape: tuple[int, int]
    read: Callable[[tuple[slice, slice]], Array]
    kind: Kind | None = None
    bias: Bias = "unknown"

    def layouts(self, kind: Kind) -> tuple[bool, ...]:
        """Whether torch may keep it `[in, out]`, if it is a module of this kind; nothing if it is none."""
        if self.kind not in (None, kind):
            return ()
        return {"linear": (False, True), "embedding": (True,), "conv": (False,)}[kind]


@dataclass(frozen=True)
class Checkpoint:
    """Every `.weight` of a model with two axes or more, by its module's torch name, read only when asked for.

    `heads` are the output layers that "all-linear" leaves out. None: the checkpoint is only a file,
    which says neither what is an output layer nor what is linear and what an embedding.
    """

    weights: tuple[_Weight, ...]
    modules: frozenset[str]
    heads: frozenset[str] | None = None

    @staticmethod
    def of_module(model: nn.Module, *, heads: frozenset[str]) -> Checkpoint:
        """The modules of a torch model that can have LoRA: `nn.Linear`, transformers' `Conv1D`, convolutions and
        embeddings."""
        weights = []
        elsewhere = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        for name, module in model.named_modules():
            kind = _kind_of(module)
            # PEFT wraps an embedding under its first name only: by others it is called without the adapter.
            if kind is None or (kind == "embedding" and elsewhere[id(module)] > 1):
                continue
            weight = module.weight
            shape = int(weight.shape[0]), math.prod(weight.shape[1:])
            bias: Bias = "none" if getattr(module, "bias", None) is None else "added"
            weights.append(_Weight(name, shape, partial(_read_tensor, weight), kind, bias))
        return Checkpoint(tuple(weights), frozenset(weight.module for weight in weights), heads)

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
            if key.endswith(".weight") and len(shape) > 1:
                module = key.removesuffix(".weight")
                kind: Kind | None = "conv" if len(shape) > 2 else None
                bias: Bias = "added" if f"{module}.bias" in shapes else "none"
                rows = shape[0], math.prod(shape[1:])
                weights.append(_Weight(module, rows, partial(_read_opened, opened, key), kind, bias))
        return Checkpoint(tuple(weights), frozenset(weight.module for weight in weights))

    @staticmethod
    def of_package(package: Package) -> Checkpoint:
        """The weights of a package's points, and those that it lets adapters replace."""
        weights: list[_Weight] = []
        for name, point in package.points.items():
            inputs, outputs = point.in_features // point.groups, point.out_features
            shape = (inputs, outputs) if point.kind == "embedding" else (outputs, inputs)
            weights.append(_Weight(name, shape, partial(_read_point, package, point), point.kind, point.bias))
        for weight in package.replaceable.values():
            if weight.role == "linear_weight" and weight.module not in package.points:
                outputs, inputs = weight.shape[::-1] if weight.in_out else weight.shape
                read = partial(_read_replaceable, package, weight)
                weights.append(_Weight(weight.module, (outputs, inputs), read, "linear"))
        # Not None: the modules are known to be linear, whatever else reads an equal weight.
        return Checkpoint(tuple(weights), frozenset(weight.module for weight in weights), frozenset())

    def find(self, weight: Array, kind: Kind = "linear", *, within: float = 0.0) -> list[list[Match]]:
        """Every way to read `weight` `[in, out]` as one module's of a kind, or several linear ones packed side by side.

        Compared in the graph's type, bit for bit; a quantised weight by its distance, which may be so many times
        the norm of the checkpoint's. Usually one way; none where the graph's weight is not the
        checkpoint's; several where modules hold equal values.
        """
        same = _comparison(within)
        matches = self._at(weight, 0, same, kind)
        whole = {match.module: [match] for match in matches if match.outputs == weight.shape[1]}
        if whole or kind != "linear":
            return list(whole.values())
        return list(self._packed(weight, 0, (), same))

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
            for in_out in candidate.layouts("linear"):
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

    def _at(self, weight: Array, start: int, same: _Same, kind: Kind = "linear") -> Iterator[Match]:
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


def _kind_of(module: nn.Module) -> Kind | None:
    """By name, along the classes it inherits from: torch is not needed to attach points to a file.

    MultiheadAttention reads the weight of its `out_proj` and never calls it: an adapter there has no effect. A
    convolution that pads otherwise than with zeros does what PEFT's A beside it does not.
    """
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds & {"Linear", "Conv1D"} and "NonDynamicallyQuantizableLinear" not in kinds:
        return "linear"
    if kinds & {"Conv1d", "Conv2d", "Conv3d"} and getattr(module, "padding_mode", "zeros") == "zeros":
        return "conv"
    # PEFT looks its A up by what the module is called with, and knows of what a class of its own adds one thing: a
    # scale. Another forward (OPT's positions, which begin at 2) has rows that A's are not.
    plain = type(module).forward.__qualname__ == "Embedding.forward" or hasattr(module, "embed_scale")
    # With max_norm PEFT renormalises A's rows too.
    return "embedding" if "Embedding" in kinds and plain and getattr(module, "max_norm", None) is None else None


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"must be an index of safetensors shards: {error!r}", path=index) from error
        files = [folder / Path(name).name for name in names]
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
    values: Array = (weight if point.kind == "embedding" else weight.T)[part]
    return values


def _read_replaceable(package: Package, weight: Replaceable, part: tuple[slice, slice]) -> Array:
    values: Array = package.default(weight)[0].T[part]
    return values


def _read_opened(opened: Any, key: str, part: tuple[slice, slice]) -> Array:
    rows: Array = opened.get_slice(key)[part[0]]
    values = rows.reshape(len(rows), -1)[:, part[1]]
    return values.astype(np.float32) if values.dtype == ml_dtypes.bfloat16 else values
