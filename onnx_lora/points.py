"""The contract between exporter, adapters and runtime: what an injection point and a whole weight are, where they lie
in a package, and how their tensors are laid out. It knows no file, no graph and no adapter format."""

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
    "in_memory",
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
    """The first place in a file, from `offset` on, where a tensor of `size` may begin. All three in bytes."""
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
    return any(path.endswith(tuple(names)) for path in _around(module))


def matching(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    """Those of `names` by which `matches` finds one of `modules`. Its time grows with the sum of both, not with their
    product."""
    wanted = set(names)
    lengths = {len(name) for name in wanted}
    paths = set[str]()
    for module in modules:
        paths.update(_around(module))
    found = set[str]()
    for path in paths:
        for length in lengths:
            if length <= len(path):
                found.add(path[len(path) - length :])
    return found & wanted


def _around(module: str) -> list[str]:
    """A module, and those around it: `a`, `a.b` and `a.b.c`."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the bytes of one initializer lie in a package: little-endian, C order; of 4-bit types two
    numbers in a byte, the first in its low bits."""

    file: str
    """A file of the package's folder."""

    offset: int
    """Where the first byte lies in it, in bytes."""

    shape: tuple[int, ...]
    """The initializer's shape."""

    dtype: str
    """`float32`, `float16`, `float64`, or of a quantized tensor `int8`, `uint8`, `int4`, `uint4`."""

    @property
    def size(self) -> int:
        """In bytes."""
        count = math.prod(self.shape)
        if self.dtype in NIBBLES:
            return (count + 1) // 2
        return count * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """An initializer of the base graph, and where it lies."""

    initializer: str
    """Its name in the base graph."""

    stored: StoredTensor
    """Where its bytes lie."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """What stands beside a quantized initializer."""

    scheme: Scheme
    """How its numbers stand for floats."""

    scale: NamedTensor
    """The scales."""

    zero_point: NamedTensor | None = None
    """The zero points; without them the scheme has a zero of its own."""

    @property
    def tensors(self) -> tuple[NamedTensor, ...]:
        """The scale, and the zero point where there is one."""
        return (self.scale,) if self.zero_point is None else (self.scale, self.zero_point)


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A module's weight, or outputs of it, inside one initializer of the base graph.

    A packed projection (q, k and v in one initializer) has one part per module: `start` says which of the initializer's
    outputs are the module's. A module that was cut up (gate and up of one weight, in two initializers) has one part per
    piece: `first` says which of the module's outputs it holds.
    """

    initializer: str
    """Its name in the base graph."""

    stored: StoredTensor
    """Where the whole initializer lies."""

    outputs: int
    """How many outputs of the module it holds."""

    transposed: bool = False
    """The initializer is stored `[out, in]`, as torch keeps a Linear weight; else `[in, out]`."""

    start: int = 0
    """The first of the initializer's outputs that is the module's."""

    first: int = 0
    """Which of the module's outputs that is."""

    quantized: Quantization | None = None
    """Of a quantized initializer, what stands beside it."""

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

    An adapter's tensors for it: `<module>.lora_A.weight` `[rows, in, rank]` and `<module>.lora_B.weight`
    `[rows, rank, out]`, of type `dtype`, the scale multiplied into B; where the branch takes DoRA's scale,
    `<module>.dora_scale` `[rows, 1, out]` too.
    """

    module: str
    """The torch module path."""

    in_features: int
    """`in`: features, rows of an embedding's table, or of a convolution channels times kernel."""

    out_features: int
    """`out`: features, or channels."""

    dtype: str
    """The type of the adapter's tensors: `float32`, `float16` or `float64`."""

    per_row: bool
    """Whether rows of one batch may differ here."""

    sha256: str
    """SHA-256 of W0 in torch's layout, C order, before it was quantized where the source is known: what converted
    adapters are checked against."""

    parts: tuple[WeightPart, ...]
    """Where W0 lies in the base graph: usually once, more often where a module is used by several nodes with a copy
    each, or was cut up."""

    kind: Kind = LINEAR
    """What the module computes with W0."""

    bias: Bias = "unknown"
    """Whether the module adds a bias."""

    unproven: str = ""
    """Why the graph may compute something else here than the module, or nothing; empty where nothing says so. Comparing
    the package with its checkpoint settles it: [unproven.md](unproven.md)."""

    @property
    def lora_a(self) -> str:
        """The name of A, `[rows, in, rank]`."""
        return f"{self.module}.lora_A.weight"

    @property
    def lora_b(self) -> str:
        """The name of B, `[rows, rank, out]`, the scale multiplied in."""
        return f"{self.module}.lora_B.weight"

    @property
    def dora_scale(self) -> str:
        """The name of `[rows, 1, out]`. DoRA (Liu et al. 2024), equation 5: m / ‖W0 + A · B‖, the norm of each output's
        weights."""
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
        """The shape of A behind its rank, as PEFT keeps it: `[in]`, or `[channels, *kernel]`."""
        return self.kind.factor_shape(self.in_features)

    @property
    def factor_keys(self) -> tuple[str, str]:
        """PEFT's names of the parameters A and B of this module."""
        return self.kind.factor_keys(self.module)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of W0 as PEFT sees it: `[out, in]`, `[rows of the table, features]`, `[out, channels / groups,
        *kernel]`."""
        return self.kind.torch_shape(self.in_features, self.out_features)

    def to_torch(self, weight: Array) -> Array:
        """W0 `[in, out]` in `torch_shape`, as a view."""
        return self.kind.to_torch(weight, self.in_features, self.out_features)

    def from_torch(self, weight: Array) -> Array:
        """A weight in `torch_shape` as `[in, out]`, as a view."""
        return self.kind.from_torch(weight)


@dataclass(frozen=True, slots=True)
class Branch:
    """The graph inputs through which the adapters of `modules` enter: those whose outputs one place computes side by
    side.

    One module: the inputs are the module's own tensors. Several (q, k and v packed into one weight): the A of all of
    them side by side and their B in the blocks of a diagonal, so that one pair of products serves them all. Measured on
    an int4 graph of 30 layers against a pair for each and a Concat: half the cost without an adapter, 0.4 ms less a
    token with one.
    """

    modules: tuple[str, ...]
    """The points whose tensors enter here, in the order of the outputs."""

    dora: bool = False
    """Whether there is an input for DoRA's scale too."""

    @property
    def name(self) -> str:
        """The module's, or `model.layers.0.self_attn.q_proj+k_proj+v_proj`."""
        parents = {module.rpartition(".")[0] for module in self.modules}
        if len(parents) > 1:
            return "+".join(self.modules)
        parent, dot, _ = self.modules[0].rpartition(".")
        own = [module.rpartition(".")[2] for module in self.modules]
        return f"{parent}{dot}{'+'.join(own)}"

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
        factors = (self.lora_a, self.lora_b)
        return (*factors, self.dora_scale) if self.dora else factors

    def inputs(self, tensors: Mapping[str, Array], points: Mapping[str, InjectionPoint]) -> dict[str, Array]:
        """The graph inputs, made of an adapter's tensors by point; those that the adapter does not touch stay out."""
        if len(self.modules) == 1:
            return {name: tensors[name] for name in self.names if name in tensors}
        own = [points[module] for module in self.modules]
        inputs = self._join_factors(tensors, own)
        if self.dora:
            inputs |= self._join_scales(tensors, own)
        return inputs

    def _join_factors(self, tensors: Mapping[str, Array], points: Sequence[InjectionPoint]) -> dict[str, Array]:
        """A side by side, B in the blocks of a diagonal."""
        having = [point for point in points if point.lora_a in tensors]
        if not having:
            return {}
        joined = _join([tensors[point.lora_a] for point in having])
        rows, _, ranks = joined.shape
        outputs = sum(point.out_features for point in points)
        blocks = np.zeros((rows, ranks, outputs), joined.dtype)
        rank = start = 0
        for point in points:
            if point in having:
                b = tensors[point.lora_b]
                blocks[:, rank : rank + b.shape[1], start : start + point.out_features] = b
                rank += b.shape[1]
            start += point.out_features
        return {self.lora_a: joined, self.lora_b: blocks}

    def _join_scales(self, tensors: Mapping[str, Array], points: Sequence[InjectionPoint]) -> dict[str, Array]:
        """Side by side; ones for modules that have none."""
        if not any(point.dora_scale in tensors for point in points):
            return {}
        scales: list[Array] = []
        for point in points:
            ones = np.ones((1, 1, point.out_features), np.dtype(point.dtype))
            scales.append(tensors.get(point.dora_scale, ones))
        return {self.dora_scale: _join(scales)}


def _join(tensors: Sequence[Array]) -> Array:
    """Tensors `[rows, n, m]` side by side along the last axis; one row stands for all of the others' rows."""
    rows = max(len(tensor) for tensor in tensors)
    spread = [np.broadcast_to(tensor, (rows, *tensor.shape[1:])) for tensor in tensors]
    return np.ascontiguousarray(np.concatenate(spread, axis=2))


@dataclass(frozen=True, slots=True)
class WholeWeight:
    """A whole weight that an adapter may replace. Its graph input has the parameter's name, and the base's own value as
    its default."""

    name: str
    """The torch parameter name."""

    role: Role
    """What the parameter is to its module, and so the shape of the graph input."""

    shape: tuple[int, ...]
    """The parameter's shape in torch."""

    dtype: str
    """The type of the graph input: `float32`, `float16` or `float64`."""

    free_outputs: bool
    """An adapter may bring another length along the role's free axis: outputs of a classifier's head, or entries of a
    table."""

    per_row: bool
    """Whether rows of one batch may differ here."""

    sha256: str
    """SHA-256 of the parameter in torch's layout, C order."""

    parts: tuple[WeightPart, ...]
    """Where it lies in the base graph."""

    unproven: str = ""
    """Why the graph may use something else here than the parameter; empty where nothing says so."""

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def is_quantized(self) -> bool:
        """Whether it, or a part of it, is kept in few bits."""
        return any(part.quantized is not None for part in self.parts)

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
