"""The kinds of modules that adapters change: what each computes with its weight, and how PyTorch and PEFT lay that out.

A kind knows shapes and names. It knows no graph: the exporter registers for each kind how its nodes are read and how
its branches are built (`exporter/graph_kinds`). A new kind is a class here and a file there.

Throughout, W0 is a matrix `[in, out]`, as the graph multiplies by it; PyTorch keeps it in the shape `torch_shape`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["EMBEDDING", "KINDS", "LINEAR", "Conv", "Embedding", "Kind", "Linear"]

# Numbers of any type: mypy knows no arithmetic of `np.generic`.
Array = NDArray[Any]

Shape = tuple[int, ...]


class Kind(Protocol):
    """What a kind of module answers. `inputs` and `outputs` are always those of a branch: the axes of A and of B."""

    @property
    def name(self) -> str:
        """As manifests write it: "linear"."""

    @property
    def noun(self) -> str:
        """As messages write it: "a linear module"."""

    @property
    def factor_names(self) -> tuple[str, str]:
        """PEFT's names of A and B."""

    def factor_keys(self, module: str) -> tuple[str, str]:
        """PEFT's names of the parameters A and B of a module."""

    @property
    def foldable(self) -> bool:
        """Whether W0 + A · B is a weight of the same module, so that an adapter can be folded in."""

    def problem(self, inputs: int, outputs: int) -> str | None:
        """Why no module of the kind has so many inputs and outputs, or None."""

    def factor_shape(self, inputs: int) -> Shape:
        """The shape of A behind its rank, as PEFT keeps A: `[in]`, or `[channels, *kernel]`."""

    def torch_shape(self, inputs: int, outputs: int) -> Shape:
        """The shape of the module's weight in PyTorch."""

    def weight_inputs(self, inputs: int) -> int:
        """The inputs of W0: fewer than the branch has where the module is cut into groups."""

    def branch_inputs(self, weight_inputs: int) -> int:
        """Undoes `weight_inputs`."""

    def to_torch(self, weight: Array, inputs: int, outputs: int) -> Array:
        """W0 `[in, out]` in `torch_shape`, as a view."""

    def from_torch(self, weight: Array) -> Array:
        """A weight in PyTorch's shape as W0 `[in, out]`, as a view."""

    def outputs_of(self, shape: Shape) -> int:
        """The outputs of a weight in PyTorch's shape."""

    def dense_rank(self, rank: int) -> int:
        """The rank of A where PEFT's B has `rank` columns."""

    def dense_b(self, b: Array) -> Array:
        """PEFT's B as the matrix `[out, rank]` by which the graph multiplies."""

    def compact_b(self, b: Array, outputs: int) -> Array:
        """The matrix B `[out, rank]` as PEFT keeps it; undoes `dense_b`. What lies outside of PEFT's blocks is lost."""


@dataclass(frozen=True, slots=True)
class Linear:
    """`y = x · W0`. PyTorch keeps `[out, in]`."""

    name: ClassVar[str] = "linear"
    noun: ClassVar[str] = "a linear module"
    factor_names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    foldable: ClassVar[bool] = True

    def factor_keys(self, module: str) -> tuple[str, str]:
        return f"{module}.{self.factor_names[0]}.weight", f"{module}.{self.factor_names[1]}.weight"

    def problem(self, inputs: int, outputs: int) -> str | None:
        del inputs, outputs
        return None

    def factor_shape(self, inputs: int) -> Shape:
        return (inputs,)

    def torch_shape(self, inputs: int, outputs: int) -> Shape:
        return outputs, inputs

    def weight_inputs(self, inputs: int) -> int:
        return inputs

    def branch_inputs(self, weight_inputs: int) -> int:
        return weight_inputs

    def to_torch(self, weight: Array, inputs: int, outputs: int) -> Array:
        return weight.T.reshape(self.torch_shape(inputs, outputs))

    def from_torch(self, weight: Array) -> Array:
        return weight.T

    def outputs_of(self, shape: Shape) -> int:
        return shape[0]

    def dense_rank(self, rank: int) -> int:
        return rank

    def dense_b(self, b: Array) -> Array:
        return b

    def compact_b(self, b: Array, outputs: int) -> Array:
        del outputs
        return b


@dataclass(frozen=True, slots=True)
class Embedding:
    """`y` is row `x` of the table W0. PyTorch keeps the table as it is, `[rows of the table, features]`."""

    name: ClassVar[str] = "embedding"
    noun: ClassVar[str] = "an embedding"
    factor_names: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")
    foldable: ClassVar[bool] = True

    def factor_keys(self, module: str) -> tuple[str, str]:
        return f"{module}.{self.factor_names[0]}", f"{module}.{self.factor_names[1]}"

    def problem(self, inputs: int, outputs: int) -> str | None:
        del inputs, outputs
        return None

    def factor_shape(self, inputs: int) -> Shape:
        return (inputs,)

    def torch_shape(self, inputs: int, outputs: int) -> Shape:
        return inputs, outputs

    def weight_inputs(self, inputs: int) -> int:
        return inputs

    def branch_inputs(self, weight_inputs: int) -> int:
        return weight_inputs

    def to_torch(self, weight: Array, inputs: int, outputs: int) -> Array:
        return weight.reshape(self.torch_shape(inputs, outputs))

    def from_torch(self, weight: Array) -> Array:
        return weight

    def outputs_of(self, shape: Shape) -> int:
        return shape[1]

    def dense_rank(self, rank: int) -> int:
        return rank

    def dense_b(self, b: Array) -> Array:
        return b

    def compact_b(self, b: Array, outputs: int) -> Array:
        del outputs
        return b


@dataclass(frozen=True, slots=True)
class Conv:
    """`y` is every window of `x`, times W0. PyTorch keeps `[out, channels / groups, *kernel]`.

    A branch's inputs are channels times kernel, in PyTorch's order. In groups, W0 has only `in / groups` inputs; PEFT's
    A has all of them, and its B is `[out, rank / groups]`, each group's part below the other. W0 + A · B is then no
    weight of the module.
    """

    kernel: tuple[int, ...] = ()
    """The lengths of the window's axes, one to three of them."""

    groups: int = 1
    """Into how many groups the channels are cut."""

    name: ClassVar[str] = "conv"
    factor_names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")

    @property
    def noun(self) -> str:
        """With its groups, where there are several: what is refused is refused for them."""
        return "a convolution" if self.groups == 1 else f"a convolution in {self.groups} groups"

    @property
    def foldable(self) -> bool:
        """In groups A reads all channels, and each output of W0 only those of its own group."""
        return self.groups == 1

    def factor_keys(self, module: str) -> tuple[str, str]:
        return f"{module}.{self.factor_names[0]}.weight", f"{module}.{self.factor_names[1]}.weight"

    def problem(self, inputs: int, outputs: int) -> str | None:
        """The inputs must be whole channels, and channels and outputs must divide into the groups."""
        if min(self.groups, *self.kernel, 1) < 1:
            return "impossible kernel or groups"
        if inputs % (math.prod(self.kernel) * self.groups):
            return "impossible kernel or groups"
        return "impossible groups" if outputs % self.groups else None

    def factor_shape(self, inputs: int) -> Shape:
        """`[channels, *kernel]`, all channels whatever the groups are."""
        return (inputs // math.prod(self.kernel), *self.kernel)

    def torch_shape(self, inputs: int, outputs: int) -> Shape:
        """`[out, channels / groups, *kernel]`."""
        channels, *kernel = self.factor_shape(inputs)
        return (outputs, channels // self.groups, *kernel)

    def weight_inputs(self, inputs: int) -> int:
        """Those of one group."""
        return inputs // self.groups

    def branch_inputs(self, weight_inputs: int) -> int:
        return weight_inputs * self.groups

    def to_torch(self, weight: Array, inputs: int, outputs: int) -> Array:
        return weight.T.reshape(self.torch_shape(inputs, outputs))

    def from_torch(self, weight: Array) -> Array:
        """The axes of channels and kernel become one."""
        return weight.reshape(len(weight), -1).T

    def outputs_of(self, shape: Shape) -> int:
        return shape[0]

    def dense_rank(self, rank: int) -> int:
        """Every group has a rank of its own."""
        return rank * self.groups

    def dense_b(self, b: Array) -> Array:
        """B `[out, rank / groups]` of all groups, in the blocks of a diagonal `[out, rank]`."""
        if self.groups == 1:
            return b
        outputs, rank = len(b) // self.groups, b.shape[1]
        dense = np.zeros((len(b), rank * self.groups), b.dtype)
        for group in range(self.groups):
            rows = slice(group * outputs, (group + 1) * outputs)
            columns = slice(group * rank, (group + 1) * rank)
            dense[rows, columns] = b[rows]
        return dense

    def compact_b(self, b: Array, outputs: int) -> Array:
        """The blocks on the diagonal, below each other; zeros of a B that is `dense_b`'s own are left out."""
        if self.groups == 1:
            return b
        height, rank = outputs // self.groups, b.shape[1] // self.groups
        blocks = []
        for group in range(self.groups):
            rows = slice(group * height, (group + 1) * height)
            columns = slice(group * rank, (group + 1) * rank)
            blocks.append(b[rows, columns])
        return np.concatenate(blocks)


# Without sizes of their own, one of each is enough.
LINEAR, EMBEDDING = Linear(), Embedding()

# By the name that manifests write.
KINDS: dict[str, type[Linear] | type[Embedding] | type[Conv]] = {kind.name: kind for kind in (Linear, Embedding, Conv)}
