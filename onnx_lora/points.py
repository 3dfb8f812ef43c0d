"""The contract between exporter, adapters and runtime: what an injection point and a replaceable
weight are, and how their tensors are laid out. It knows no file, no graph and no adapter format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lora.kinds import LINEAR, Kind
from onnx_lora.quantized import Scheme
from onnx_lora.roles import Role

__all__ = [
    "FLOAT_TYPES",
    "NIBBLES",
    "QUANTIZED_TYPES",
    "Array",
    "Bias",
    "Branch",
    "InjectionPoint",
    "NamedTensor",
    "Quantization",
    "StoredTensor",
    "WeightPart",
    "WholeWeight",
    "align_offset",
    "digest",
    "matches",
    "matching",
]

Array = NDArray[np.generic]

# Whether a module adds a bias. Where no checkpoint says so and the graph shows none, it may be fused elsewhere.
Bias = Literal["added", "none", "unknown"]

# What a point's tensors may be made of. ONNX Runtime's CPU provider multiplies no bfloat16.
FLOAT_TYPES = ("float32", "float16", "float64")

# What quantized weights and their zero points may be made of.
NIBBLES = ("int4", "uint4")
QUANTIZED_TYPES = ("int8", "uint8", *NIBBLES)


# Where a tensor may begin in a file of weights. ONNX Runtime maps large ones straight from the file, which works on
# page boundaries.
_PAGE = 4096  # bytes
_LARGE = 2**20  # bytes
_CACHE_LINE = 64  # bytes


def digest(weight: Array) -> str:
    """SHA-256 of a weight's values in C order, in torch's layout (`[out, in]` for Linear).

    The same number for every graph of the same base, however its exporter stored the weight.
    """
    return sha256(np.ascontiguousarray(weight).data).hexdigest()


def align_offset(offset: int, size: int) -> int:
    """The first place in a file, from `offset` on, where a tensor may begin. All three in bytes."""
    alignment = _PAGE if size >= _LARGE else _CACHE_LINE
    return offset + -offset % alignment


def in_memory(values: Array) -> Array:
    """The values in memory of their own where they were mapped: a file may be overwritten or cut off later."""
    base: object = values
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return np.array(values)
        base = base.base
    return values


def matches(module: str, names: Sequence[str]) -> bool:
    """Whether `module`, or a module around it, ends with one of `names`.

    PEFT's rule for `modules_to_save` (`_set_trainable`): plain suffixes, so that `classifier` takes
    `classifier.dense` with it, and `pre_classifier` too.
    """
    return any(path.endswith(name) for path in _around(module) for name in names)


def matching(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    """Those of `names` by which `matches` finds one of `modules`, of however many of both."""
    wanted = set(names)
    lengths = {len(name) for name in wanted}
    found = set[str]()
    for path in {path for module in modules for path in _around(module)}:
        found.update(path[len(path) - length :] for length in lengths if length <= len(path))
    return found & wanted


def _around(module: str) -> list[str]:
    """A module, and those around it."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of one initializer lie in a package: little-endian, C order; of 4-bit types two
    numbers in a byte, the first in its low bits."""

    file: str
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """In bytes."""
        count = 1
        for dim in self.shape:
            count *= dim
        if self.dtype in NIBBLES:
            return -(-count // 2)
        return count * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """An initializer of the base graph, and where it lies."""

    initializer: str
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class Quantization:
    """What stands beside a quantized initializer: how its numbers stand for floats, and by what scale and zero
    point."""

    scheme: Scheme
    scale: NamedTensor
    zero_point: NamedTensor | None = None

    @property
    def tensors(self) -> tuple[NamedTensor, ...]:
        """The scale, and the zero point where there is one."""
        return (self.scale,) if self.zero_point is None else (self.scale, self.zero_point)


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A module's weight, or outputs of it, inside one initializer of the base graph.

    `transposed`: the initializer is stored `[out, in]`, as torch keeps a Linear weight; else
    `[in, out]`. A packed projection (q, k and v in one initializer) has one part per module:
    the initializer's outputs `start` to `start + outputs` are the module's. A module that was cut up
    (gate and up of one weight, in two initializers) has one part per piece: they are the module's
    outputs `first` to `first + outputs`. `quantized`: what stands beside a quantized initializer.
    """

    initializer: str
    stored: StoredTensor
    outputs: int
    transposed: bool = False
    start: int = 0
    first: int = 0
    quantized: Quantization | None = None

    def window(self, values: Array) -> Array:
        """The module's part of the initializer's values, as a view `[in, outputs]`. A kernel's axes count as `in`."""
        matrix = values.reshape(len(values), -1) if values.ndim > 2 else values
        by_output = matrix.T if self.transposed else matrix
        return by_output[:, self.start : self.start + self.outputs]

    @property
    def matrix(self) -> tuple[int, int]:
        """Inputs and outputs of the whole initializer; (0, 0) where it has less than two axes."""
        if self.quantized is not None:
            rows, columns = self.quantized.scheme.rows, self.quantized.scheme.columns
        elif len(self.stored.shape) < 2:
            return 0, 0
        else:
            rows, columns = self.stored.shape[0], math.prod(self.stored.shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True, slots=True)
class InjectionPoint:
    """A place where an adapter enters a graph: `y' = (y + (x · lora_A) · lora_B) · dora_scale`, before any bias.

    kind        y, with W0 `[in, out]`              in
    Linear      x · W0                              features
    Embedding   row x of W0                         rows of the table
    Conv        every window of x, times W0         channels · kernel, in torch's order

    An adapter's tensors for it: `lora_a` `[rows, in, rank]` and `lora_b` `[rows, rank, out]`, of type
    `dtype`. `parts` say where W0 lies in the base graph: usually once, more often where a module is
    used by several nodes with a copy each. `sha256` is W0's before it was quantized, where that is known.

    `unproven`: why the graph may compute something else here than the module does, where it shows traces of an
    optimiser; empty where there is no such doubt. Comparing the package with its checkpoint settles it.
    """

    module: str
    in_features: int
    out_features: int
    dtype: str
    per_row: bool
    sha256: str
    parts: tuple[WeightPart, ...]
    kind: Kind = LINEAR
    bias: Bias = "unknown"
    unproven: str = ""

    @property
    def lora_a(self) -> str:
        """`[rows, in, rank]`."""
        return f"{self.module}.lora_A.weight"

    @property
    def lora_b(self) -> str:
        """`[rows, rank, out]`, the scale multiplied in."""
        return f"{self.module}.lora_B.weight"

    @property
    def dora_scale(self) -> str:
        """`[rows, 1, out]`. DoRA (Liu et al. 2024), equation 5: m / ‖W0 + A · B‖, the norm of each output's weights."""
        return f"{self.module}.dora_scale"

    @property
    def is_quantized(self) -> bool:
        """Whether W0, or a part of it, is kept in few bits."""
        return any(part.quantized is not None for part in self.parts)

    @property
    def weight_inputs(self) -> int:
        """The inputs of W0: fewer than the branch's where the module is cut into groups."""
        return self.kind.weight_inputs(self.in_features)

    @property
    def factor_shape(self) -> tuple[int, ...]:
        """Of A behind its rank, as PEFT keeps it: `[in]`, or `[channels, *kernel]`."""
        return self.kind.factor_shape(self.in_features)

    @property
    def factor_keys(self) -> tuple[str, str]:
        """PEFT's names of the parameters A and B of this module."""
        return self.kind.factor_keys(self.module)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Of W0 as PEFT sees it: `[out, in]`, `[rows of the table, features]`, `[out, channels / groups, *kernel]`."""
        return self.kind.torch_shape(self.in_features, self.out_features)

    def to_torch(self, weight: Array) -> Array:
        """W0 `[in, out]` in `torch_shape`, as a view."""
        return self.kind.to_torch(weight, self.in_features, self.out_features)

    def from_torch(self, weight: Array) -> Array:
        """A weight in `torch_shape` as `[in, out]`, as a view."""
        return self.kind.from_torch(weight)


@dataclass(frozen=True, slots=True)
class Branch:
    """The graph inputs through which the adapters of `modules` enter: those whose outputs one place
    computes side by side. `dora`: whether there is one for DoRA's scale.

    One module: the inputs are the module's own tensors. Several (packed q, k and v): A side by side and B
    block-diagonal, so that one pair of products serves them all. Measured on an int4 graph of 30 layers
    against a pair for each and a Concat: half the cost without an adapter, 0.4 ms less a token with one.
    """

    modules: tuple[str, ...]
    dora: bool = False

    @property
    def name(self) -> str:
        """The module's, or `model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        parents = {module.rpartition(".")[0] for module in self.modules}
        if len(parents) > 1:
            return "+".join(self.modules)
        parent, dot, _ = self.modules[0].rpartition(".")
        return f"{parent}{dot}{'+'.join(module.rpartition('.')[2] for module in self.modules)}"

    @property
    def lora_a(self) -> str:
        """The graph input `[rows, in, ranks]`."""
        return f"{self.name}.lora_A.weight"

    @property
    def lora_b(self) -> str:
        """The graph input `[rows, ranks, outputs]`."""
        return f"{self.name}.lora_B.weight"

    @property
    def dora_scale(self) -> str:
        """The graph input `[rows, 1, outputs]`, where the branch has one."""
        return f"{self.name}.dora_scale"

    @property
    def names(self) -> tuple[str, ...]:
        """All of its graph inputs."""
        return (self.lora_a, self.lora_b, *([self.dora_scale] if self.dora else []))

    def inputs(self, tensors: Mapping[str, Array], points: Mapping[str, InjectionPoint]) -> dict[str, Array]:
        """The graph inputs, made of an adapter's tensors by point; those that the adapter does not touch stay out."""
        if len(self.modules) == 1:
            return {name: tensors[name] for name in self.names if name in tensors}
        own = [points[module] for module in self.modules]
        return self._factors(tensors, own) | (self._scales(tensors, own) if self.dora else {})

    def _factors(self, tensors: Mapping[str, Array], points: Sequence[InjectionPoint]) -> dict[str, Array]:
        """A side by side, B in the blocks of a diagonal."""
        having = [point for point in points if point.lora_a in tensors]
        if not having:
            return {}
        a = [tensors[point.lora_a] for point in having]
        rows = max(len(factor) for factor in a)
        joined = np.concatenate([np.broadcast_to(factor, (rows, *factor.shape[1:])) for factor in a], axis=2)
        blocks = np.zeros((rows, joined.shape[2], sum(point.out_features for point in points)), a[0].dtype)
        rank = start = 0
        for point in points:
            if point in having:
                b = tensors[point.lora_b]
                blocks[:, rank : rank + b.shape[1], start : start + point.out_features] = b
                rank += b.shape[1]
            start += point.out_features
        return {self.lora_a: np.ascontiguousarray(joined), self.lora_b: blocks}

    def _scales(self, tensors: Mapping[str, Array], points: Sequence[InjectionPoint]) -> dict[str, Array]:
        """Side by side; ones for modules that have none."""
        if not any(point.dora_scale in tensors for point in points):
            return {}
        scales = [
            tensors.get(point.dora_scale, np.ones((1, 1, point.out_features), np.dtype(point.dtype)))
            for point in points
        ]
        rows = max(len(scale) for scale in scales)
        joined = np.concatenate([np.broadcast_to(scale, (rows, *scale.shape[1:])) for scale in scales], axis=2)
        return {self.dora_scale: np.ascontiguousarray(joined)}


@dataclass(frozen=True, slots=True)
class WholeWeight:
    """A whole weight that an adapter may replace, by its torch parameter name. Its `role` says how it is laid out.

    `shape`: in PyTorch. `free_outputs`: an adapter may bring another length along the role's free axis (the outputs of
    a classifier's head, the entries of a table). `unproven`: as of a point.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    free_outputs: bool
    per_row: bool
    sha256: str
    parts: tuple[WeightPart, ...]
    unproven: str = ""

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def has_rows(self) -> bool:
        """Whether the graph input has a first axis of rows: it is a linear module's weight or bias."""
        return self.role.has_rows

    @property
    def outputs(self) -> int:
        """How many outputs a linear module's weight or bias has, or entries a table."""
        return self.role.outputs(self.shape)

    @property
    def graph_shape(self) -> tuple[int, ...]:
        """The shape of the base's own value as the graph input takes it, with one row."""
        return self.role.graph_shape(self.shape)

    @property
    def free_graph_shape(self) -> tuple[int | None, ...]:
        """`graph_shape`, with None where an adapter may bring another length."""
        free = self.role.free_axis if self.free_outputs else None
        lengths: list[int | None] = list(self.graph_shape)
        if free is not None:
            lengths[free] = None
        return tuple(lengths)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of torch's `shape` can take this one's place."""
        if not self.free_outputs:
            return tuple(shape) == self.shape
        return min(shape, default=0) > 0 and self.role.fits(tuple(shape), self.shape)

    def to_graph(self, parameter: Array) -> Array:
        """A torch parameter as the graph input takes it, with one row."""
        return self.role.to_graph(parameter)

    def to_torch(self, value: Array) -> Array:
        """A graph input's value (one row) as the torch parameter."""
        return self.role.to_torch(value)

    def to_initializer(self, value: Array, part: WeightPart) -> Array:
        """A graph input's value (one row) as the base graph's initializer stores it."""
        return self.role.to_initializer(value, transposed=part.transposed)

    def from_initializer(self, stored: Array, part: WeightPart) -> Array:
        """The base's own value as the graph input takes it, with one row."""
        return self.role.from_initializer(stored, transposed=part.transposed)
