"""Small edits of a graph that keep it valid: adding nodes, constants and optional inputs, and putting
one value in another's place. It knows ONNX, not LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.points import Array

__all__ = ["Surgeon"]


class Surgeon:
    """Edits one graph.

    New nodes stand where `insert_after` or `insert_before` said last, in the order in which they are made.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._opset = model.opset_imports.get("", 1)
        self._names = _names_in(model.graph)
        # How often a name was made free by a number behind it.
        self._numbered: dict[str, int] = {}
        # Constants of ours by their numbers: a vector or a scalar.
        self._constants: dict[tuple[int, ...] | int, ir.Value] = {}
        # Where nodes stand. A node that is inserted behind another has that one's place.
        self._places: dict[ir.Node, int] = {}
        for place, node in enumerate(model.graph):
            self._places[node] = place
        self._after: ir.Node | None = None
        self._before: ir.Node | None = None

    def insert_after(self, node: ir.Node) -> None:
        """Let the next nodes stand behind `node`, each behind the one made before it."""
        self._after = node
        self._before = None

    def insert_before(self, node: ir.Node) -> None:
        """Let the next nodes stand right before `node`, each behind the one made before it."""
        self._after = None
        self._before = node

    def first(self, nodes: Sequence[ir.Node]) -> ir.Node:
        """Of several nodes that the graph had from the start, the one that stands first."""
        return min(nodes, key=lambda node: self._places[node])

    def later(self, node: ir.Node, inserted: ir.Node) -> ir.Node:
        """Of a node that the graph had from the start and one that was inserted, the one that stands later."""
        return node if self._places[node] > self._places[inserted] else inserted

    def op(self, kind: str, *inputs: ir.Value, name: str, **attributes: int | str | Sequence[int]) -> ir.Value:
        """Add a node with one output, and return it."""
        (output,) = self.ops(kind, *inputs, name=name, outputs=1, **attributes)
        return output

    def ops(
        self, kind: str, *inputs: ir.Value, name: str, outputs: int, **attributes: int | str | Sequence[int]
    ) -> list[ir.Value]:
        """Add a node with several outputs, and return them."""
        name = self._free(name)
        made: list[ir.Value] = []
        for _ in range(outputs):
            output_name = self._free(f"{name}.out")
            made.append(ir.Value(name=output_name))
        node = ir.node(kind, list(inputs), attributes, outputs=made, name=name)
        self._insert(node)
        return made

    def _insert(self, node: ir.Node) -> None:
        if self._before is not None:
            self.graph.insert_before(self._before, node)
            self._places[node] = self._places[self._before] - 1
            return
        assert self._after is not None  # one of the two is always said first
        self.graph.insert_after(self._after, node)
        # What is inserted behind a node stands before all that came later from the start.
        self._places[node] = self._places[self._after]
        self._after = node

    def unsqueeze(self, value: ir.Value, axes: Sequence[int], *, name: str) -> ir.Value:
        """Add axes of length 1."""
        return self._with_axes("Unsqueeze", value, axes, name)

    def squeeze(self, value: ir.Value, axes: Sequence[int], *, name: str) -> ir.Value:
        """Take out axes of length 1."""
        return self._with_axes("Squeeze", value, axes, name)

    def _with_axes(self, kind: str, value: ir.Value, axes: Sequence[int], name: str) -> ir.Value:
        """Since opset 13 the axes are an input, before that an attribute."""
        if self._opset < 13:
            return self.op(kind, value, name=name, axes=axes)
        return self.op(kind, value, self.integers(axes), name=name)

    def split(self, value: ir.Value, sizes: ir.Value, count: int, *, name: str) -> list[ir.Value]:
        """Cut the last axis into `count` pieces. `sizes`: their lengths, a constant; since opset 13 an input."""
        if self._opset < 13:
            assert sizes.const_value is not None
            pieces = [int(size) for size in sizes.const_value.numpy()]
            return self.ops("Split", value, name=name, outputs=count, axis=-1, split=pieces)
        return self.ops("Split", value, sizes, name=name, outputs=count, axis=-1)

    def integers(self, values: Sequence[int]) -> ir.Value:
        """A constant int64 vector; equal ones are shared."""
        name = "_".join(str(value) for value in values)
        return self._constant(tuple(values), name)

    def integer(self, value: int) -> ir.Value:
        """A constant int64 scalar."""
        return self._constant(value, f"scalar_{value}")

    def number(self, value: float, dtype: np.dtype[np.generic]) -> ir.Value:
        """A constant scalar of a float type."""
        name = f"onnx_lora.{dtype.name}_{value:g}"
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        return self._initializer(self._free(name), np.array(value, dtype))

    def _constant(self, key: tuple[int, ...] | int, name: str) -> ir.Value:
        if key not in self._constants:
            free = self._free(f"onnx_lora.{name}")
            self._constants[key] = self._initializer(free, np.array(key, dtype=np.int64))
        return self._constants[key]

    def optional_input(self, name: str, shape: Sequence[int | str], default: Array | ir.TensorProtocol) -> ir.Value:
        """A graph input with a default: an initializer of the same name.

        Raises ModelError: the name is taken.
        """
        if name in self._names:
            raise ModelError(
                f"the graph has a value called {name!r} already: it has LoRA weights or points of its own; "
                "start from a graph of the plain base model"
            )
        self._names.add(name)
        value = self._initializer(name, default)
        value.shape = ir.Shape(shape)
        self.graph.inputs.append(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value, *, but: ir.Node | None = None) -> None:
        """Let everything that uses `old` use `new` (not `but`); a graph output keeps its name."""
        for use in list(old.uses()):
            if use.node is not but:
                use.node.replace_input_with(use.idx, new)
        new.type = old.type
        new.shape = old.shape
        if old.is_graph_output():
            self._replace_output(old, new)

    def _replace_output(self, old: ir.Value, new: ir.Value) -> None:
        """Give `new` the name and the place of a graph output."""
        for index, output in enumerate(self.graph.outputs):
            if output is not old:
                continue
            self.graph.outputs[index] = new
            name = old.name
            assert name is not None  # every graph output has one
            old.name = self._free(f"{name}.base")
            new.name = name

    def drop_dead(self, node: ir.Node) -> None:
        """Remove `node` if nothing uses it, and what only it used: nodes and initializers."""
        if any(output.uses() or output.is_graph_output() for output in node.outputs):
            return
        inputs = [value for value in node.inputs if value is not None]
        self.graph.remove(node, safe=True)
        self._names.difference_update(output.name for output in node.outputs)
        for value in inputs:
            self._drop_dead_value(value)

    def _drop_dead_value(self, value: ir.Value) -> None:
        """Remove what makes a value, or the initializer that it is, if nothing uses it."""
        producer = value.producer()
        if producer is not None:
            self.drop_dead(producer)
        elif value.is_initializer() and not value.uses() and not value.is_graph_input():
            self.free_name(value)

    def free_name(self, initializer: ir.Value) -> None:
        """Make an initializer's name free: remove it if it is unused, else rename it."""
        name = initializer.name
        assert name is not None
        if not initializer.uses():
            del self.graph.initializers[name]
        else:
            initializer.name = self._free(f"{name}.base")
        self._names.discard(name)

    def own_copy(self, initializer: ir.Value, name: str) -> ir.Value:
        """Another initializer over the same tensor."""
        assert initializer.const_value is not None
        return self._initializer(self._free(name), initializer.const_value)

    def _initializer(self, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
        tensor = ir.tensor(content, name=name) if isinstance(content, np.ndarray) else content
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _free(self, name: str) -> str:
        """The name, or the name with a number behind it where it is taken; it is taken from now on."""
        free = name
        while free in self._names:
            self._numbered[name] = self._numbered.get(name, 0) + 1
            free = f"{name}_{self._numbered[name]}"
        self._names.add(free)
        return free


def _names_in(graph: ir.Graph) -> set[str | None]:
    """The names of a graph's nodes, and of all its values: those that its nodes' bodies compute too."""
    names: set[str | None] = set(graph.initializers)
    names.update(value.name for value in graph.inputs)
    names.update(node.name for node in graph)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        names.update(output.name for output in node.outputs)
    return names
