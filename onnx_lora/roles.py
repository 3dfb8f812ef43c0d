"""The roles of whole weights: what a parameter that an adapter may replace is to its module, and how PyTorch, the
graph's input and the base graph's initializer lay it out.

A role knows shapes and axes. It knows no graph and no package. A new role is a class here, and an entry of `ROLES`.

Everywhere, `shape` is the parameter's in PyTorch, a graph input's value has one row where the role has rows, and
`transposed` says that the initializer has the axes of a weight `[in, out]` the other way round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROLES", "LinearBias", "LinearWeight", "Parameter", "Role", "Table"]

# Numbers of any type: mypy knows no arithmetic of `np.generic`.
Array = NDArray[Any]

Shape = tuple[int, ...]


class Role(Protocol):
    """What a role of a whole weight answers."""

    @property
    def name(self) -> str:
        """As manifests write it: "linear_weight"."""

    @property
    def has_rows(self) -> bool:
        """Whether the graph input has a first axis of rows, so that rows of one batch may differ: a linear module's."""

    @property
    def free_axis(self) -> int | None:
        """The axis of the graph input along which an adapter may bring another length; None: there is none."""

    def problem(self, shape: Shape) -> str | None:
        """Why no parameter of this role has this shape, or None."""

    def graph_shape(self, shape: Shape) -> Shape:
        """The shape of the graph input."""

    def torch_shape(self, graph_shape: Shape) -> Shape | None:
        """Undoes `graph_shape`; None where no value of one row has that shape."""

    def initializer_shape(self, shape: Shape, *, transposed: bool) -> Shape:
        """The shape of the base graph's initializer."""

    def outputs(self, shape: Shape) -> int:
        """The length of the free axis; of a role that has none, of the last one."""

    def fits(self, shape: Shape, base: Shape) -> bool:
        """Whether a parameter can take the place of the base's where the free axis may have another length."""

    def to_graph(self, parameter: Array) -> Array:
        """A torch parameter as the graph input takes it."""

    def to_torch(self, value: Array) -> Array:
        """A graph input's value as the torch parameter, as a view."""

    def to_initializer(self, value: Array, *, transposed: bool) -> Array:
        """A graph input's value as the base graph's initializer stores it."""

    def from_initializer(self, stored: Array, *, transposed: bool) -> Array:
        """The base graph's initializer as the graph input takes it."""


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A linear module's weight: PyTorch keeps `[out, in]`, the graph input is `[rows, in, out]`. Its outputs may be
    free."""

    in_out: bool = False
    """PyTorch keeps it `[in, out]`, as transformers' Conv1D does."""

    name: ClassVar[str] = "linear_weight"
    has_rows: ClassVar[bool] = True
    free_axis: ClassVar[int | None] = 2

    def problem(self, shape: Shape) -> str | None:
        return None if len(shape) == 2 else f"a linear module's weight must have two axes, and has {len(shape)}"

    def graph_shape(self, shape: Shape) -> Shape:
        first, second = shape
        return (1, first, second) if self.in_out else (1, second, first)

    def torch_shape(self, graph_shape: Shape) -> Shape | None:
        if len(graph_shape) != 3 or graph_shape[0] != 1:
            return None
        _, inputs, outputs = graph_shape
        return (inputs, outputs) if self.in_out else (outputs, inputs)

    def initializer_shape(self, shape: Shape, *, transposed: bool) -> Shape:
        _, inputs, outputs = self.graph_shape(shape)
        return (outputs, inputs) if transposed else (inputs, outputs)

    def outputs(self, shape: Shape) -> int:
        return shape[1] if self.in_out else shape[0]

    def fits(self, shape: Shape, base: Shape) -> bool:
        inputs = 0 if self.in_out else 1
        return len(shape) == 2 and shape[inputs] == base[inputs]

    def to_graph(self, parameter: Array) -> Array:
        return np.ascontiguousarray(parameter if self.in_out else parameter.T)[None]

    def to_torch(self, value: Array) -> Array:
        weight: Array = value[0]
        return weight if self.in_out else weight.T

    def to_initializer(self, value: Array, *, transposed: bool) -> Array:
        weight = value[0]
        return np.ascontiguousarray(weight.T if transposed else weight)

    def from_initializer(self, stored: Array, *, transposed: bool) -> Array:
        return np.ascontiguousarray(stored.T if transposed else stored)[None]


@dataclass(frozen=True, slots=True)
class LinearBias:
    """A linear module's bias: PyTorch keeps `[out]`, the graph input is `[rows, 1, out]`. Its outputs may be free."""

    name: ClassVar[str] = "linear_bias"
    has_rows: ClassVar[bool] = True
    free_axis: ClassVar[int | None] = 2

    def problem(self, shape: Shape) -> str | None:
        return None if len(shape) == 1 else f"a linear module's bias must have one axis, and has {len(shape)}"

    def graph_shape(self, shape: Shape) -> Shape:
        return (1, 1, *shape)

    def torch_shape(self, graph_shape: Shape) -> Shape | None:
        if len(graph_shape) != 3 or graph_shape[:2] != (1, 1):
            return None
        return graph_shape[2:]

    def initializer_shape(self, shape: Shape, *, transposed: bool) -> Shape:
        del transposed
        return shape

    def outputs(self, shape: Shape) -> int:
        return shape[0]

    def fits(self, shape: Shape, base: Shape) -> bool:
        return len(shape) == len(base)

    def to_graph(self, parameter: Array) -> Array:
        return parameter[None, None, :]

    def to_torch(self, value: Array) -> Array:
        bias: Array = value[0, 0]
        return bias

    def to_initializer(self, value: Array, *, transposed: bool) -> Array:
        del transposed
        return np.ascontiguousarray(value[0, 0])

    def from_initializer(self, stored: Array, *, transposed: bool) -> Array:
        del transposed
        return stored[None, None, :]


@dataclass(frozen=True, slots=True)
class Table:
    """An embedding's weight, `[entries, features]` in PyTorch and as graph input: it has no rows. Its entries may be
    free."""

    name: ClassVar[str] = "table"
    has_rows: ClassVar[bool] = False
    free_axis: ClassVar[int | None] = 0

    def problem(self, shape: Shape) -> str | None:
        return None if len(shape) == 2 else f"a table must have two axes, and has {len(shape)}"

    def graph_shape(self, shape: Shape) -> Shape:
        return shape

    def torch_shape(self, graph_shape: Shape) -> Shape | None:
        return graph_shape

    def initializer_shape(self, shape: Shape, *, transposed: bool) -> Shape:
        return shape[::-1] if transposed else shape

    def outputs(self, shape: Shape) -> int:
        return shape[0]

    def fits(self, shape: Shape, base: Shape) -> bool:
        return len(shape) == 2 and shape[1] == base[1]

    def to_graph(self, parameter: Array) -> Array:
        return parameter

    def to_torch(self, value: Array) -> Array:
        return value

    def to_initializer(self, value: Array, *, transposed: bool) -> Array:
        return np.ascontiguousarray(value.T if transposed else value)

    def from_initializer(self, stored: Array, *, transposed: bool) -> Array:
        return np.ascontiguousarray(stored.T if transposed else stored)


@dataclass(frozen=True, slots=True)
class Parameter:
    """Any other parameter, such as a norm's, in PyTorch's shape as graph input too: it has no rows, and its shape is
    the base's."""

    name: ClassVar[str] = "parameter"
    has_rows: ClassVar[bool] = False
    free_axis: ClassVar[int | None] = None

    def problem(self, shape: Shape) -> str | None:
        del shape
        return None

    def graph_shape(self, shape: Shape) -> Shape:
        return shape

    def torch_shape(self, graph_shape: Shape) -> Shape | None:
        return graph_shape

    def initializer_shape(self, shape: Shape, *, transposed: bool) -> Shape:
        return shape[::-1] if transposed else shape

    def outputs(self, shape: Shape) -> int:
        return shape[-1] if shape else 1

    def fits(self, shape: Shape, base: Shape) -> bool:
        return shape == base

    def to_graph(self, parameter: Array) -> Array:
        return parameter

    def to_torch(self, value: Array) -> Array:
        return value

    def to_initializer(self, value: Array, *, transposed: bool) -> Array:
        return np.ascontiguousarray(value.T if transposed else value)

    def from_initializer(self, stored: Array, *, transposed: bool) -> Array:
        return np.ascontiguousarray(stored.T if transposed else stored)


# By the name that manifests write.
ROLES: dict[str, type[LinearWeight] | type[LinearBias] | type[Table] | type[Parameter]] = {
    role.name: role for role in (LinearWeight, LinearBias, Table, Parameter)
}
