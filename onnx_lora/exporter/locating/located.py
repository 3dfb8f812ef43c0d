"""What is found of modules in one graph: the products that compute them, and nodes that get no point. It looks for
nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.graph.product import Product
from onnx_lora.exporter.graph.values import initializer_behind
from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind, graph_kind_of
from onnx_lora.points import Array, Bias

__all__ = ["Located", "Occurrence", "UnplacedNode", "have_same_weight", "label_of"]

# ONNX's operators that add their module's bias themselves. Of a product of a quantized weight (MatMulNBits) the bias is
# never replaced, so nobody asks where it lies.
_ADDING = ("Conv", "Gemm")


@dataclass(frozen=True, slots=True)
class Occurrence:
    """What a product computes of one module; `guess` is the name the graph gives it.

    The product's outputs `start` to `start + outputs` are the module's: fewer than all in a packed
    projection. They are the module's outputs from `first` on, of `size` in all: some of them where the
    module was cut up.
    `in_out`: torch keeps the weight `[in, out]`. `reference` reads the checkpoint's weight, as torch
    keeps it, where the checkpoint said which module this is, and `known_bias` whether that module has a bias.
    `twins`: other modules that have the same weight. `unproven`: why the graph may compute something else here than
    the module does, or nothing.
    """

    product: Product
    module: str
    guess: str
    outputs: int
    size: int
    start: int = 0
    first: int = 0
    in_out: bool = False
    reference: Callable[[], Array] | None = field(default=None, compare=False)
    known_bias: Bias = "unknown"
    twins: tuple[str, ...] = ()
    unproven: str = ""

    @property
    def node(self) -> ir.Node:
        return self.product.node

    @property
    def graph_kind(self) -> GraphKind:
        """What graphs show of modules of this kind."""
        return graph_kind_of(self.product)

    @property
    def weight(self) -> ir.Value:
        """The initializer."""
        return self.product.weight.value

    @property
    def in_features(self) -> int:
        return self.product.inputs

    @property
    def dtype(self) -> str:
        """The type the node computes in."""
        return self.product.dtype

    @property
    def is_whole(self) -> bool:
        """Whether the product computes this module alone."""
        return self.outputs == self.product.outputs

    @property
    def is_piece(self) -> bool:
        """Whether the product computes some of the module's outputs only."""
        return self.outputs < self.size

    @property
    def bias(self) -> tuple[ir.Node, int] | None:
        """The node and input position of the bias added to the product, if one is."""
        node, output = self.node, self.product.output
        position = self.product.bias_input
        if node.op_type in _ADDING and position is not None:
            return (node, position) if self._is_bias(self.product.added) else None
        uses = list(output.uses())
        if len(uses) != 1 or output.is_graph_output():
            return None
        add = uses[0].node
        if add.op_type != "Add" or add.graph is not node.graph:
            return None
        position = 1 - uses[0].idx
        return (add, position) if self._is_bias(add.inputs[position]) else None

    def _is_bias(self, value: ir.Value | None) -> bool:
        """One number for each output of the node; anything else is added, and is no bias of a module."""
        initializer = initializer_behind(value)
        if initializer is None or initializer.shape is None:
            return False
        return tuple(initializer.shape.numpy()) == (self.product.outputs,)

    @property
    def has_bias(self) -> Bias:
        """By the checkpoint, else by the graph, where it shows one."""
        if self.known_bias != "unknown":
            return self.known_bias
        if self.graph_kind.looks_up:
            return "none"
        return "unknown" if self.bias is None else "added"

    @property
    def adds_more(self) -> bool:
        """Whether a Gemm adds what is no bias: computed, or of another shape."""
        return self.node.op_type == "Gemm" and self.bias is None and len(self.node.inputs) > 2

    def window(self) -> Array:
        """The module's own weight `[in, outputs]`."""
        return self.product.values()[:, self.start : self.start + self.outputs]


@dataclass(frozen=True, slots=True)
class UnplacedNode:
    """A node with a weight that gets no point, why, and the modules it may belong to: they get none either.

    `node`: its label. `other_weight`: what it computes with may not be the modules' weights and biases, which nothing
    may take the place of then.
    """

    node: str
    reason: str
    modules: tuple[str, ...]
    other_weight: bool = False


@dataclass(frozen=True, slots=True)
class Located:
    """What `locate` found in one graph, in its order: products by module, and nodes without a place."""

    occurrences: tuple[Occurrence, ...]
    unplaced: tuple[UnplacedNode, ...]

    def under(self, prefix: str) -> Located:
        """The same with `prefix` before every module's name."""
        occurrences: list[Occurrence] = []
        for one in self.occurrences:
            occurrences.append(replace(one, module=prefix + one.module, guess=prefix + one.guess))
        unplaced: list[UnplacedNode] = []
        for node in self.unplaced:
            modules = tuple(prefix + module for module in node.modules)
            unplaced.append(replace(node, modules=modules))
        return Located(tuple(occurrences), tuple(unplaced))

    def without(self, reasons: Mapping[str, str], *, other_weight: bool) -> Located:
        """The same, but that these modules have no place: why, by module."""
        kept: list[Occurrence] = []
        unplaced = list(self.unplaced)
        for one in self.occurrences:
            if one.module in reasons:
                reason = reasons[one.module]
                unplaced.append(UnplacedNode(label_of(one.node), reason, (one.module,), other_weight))
            else:
                kept.append(one)
        return Located(tuple(kept), tuple(unplaced))


def label_of(node: ir.Node) -> str:
    """A node's name, or what stands for it."""
    if node.name:
        return node.name
    output = node.outputs[0].name if node.outputs else None
    return output or node.op_type


def have_same_weight(one: Occurrence, other: Occurrence) -> bool:
    """Whether two nodes multiply with the same values for their module."""
    if _where(one) == _where(other):
        return one.outputs == other.outputs
    return np.array_equal(one.window(), other.window())


def _where(one: Occurrence) -> tuple[object, ...]:
    """The initializers that an occurrence's weight is read from, and how. Where these are equal, the weights are."""
    product = one.product
    initializers = tuple(operand.value for operand in product.operands)
    scheme = None if product.quantized is None else product.quantized.scheme
    return (initializers, product.transposed, one.start, scheme)
