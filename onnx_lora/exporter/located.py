"""What is found of modules in one graph: the products that compute them, and nodes that get no point. It looks for
nothing itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.calls import Calls
from onnx_lora.exporter.products import Product, unwrap
from onnx_lora.exporter.traces import Surroundings, Traces
from onnx_lora.kinds import Embedding
from onnx_lora.points import Array, Bias
from onnx_lora.quantized import Scheme

__all__ = ["Located", "Occurrence", "Stray", "label_of", "same_weight"]


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
    def bias(self) -> tuple[ir.Node, int] | None:
        """The node and input position of the bias added to the product, if one is."""
        node, output = self.node, self.product.output
        if node.op_type in ("Conv", "Gemm"):
            return (node, 2) if len(node.inputs) > 2 and self._is_bias(node.inputs[2]) else None
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
        initializer, _ = unwrap(value)
        if initializer is None or initializer.shape is None:
            return False
        return tuple(initializer.shape.numpy()) == (self.product.outputs,)

    @property
    def has_bias(self) -> Bias:
        """By the checkpoint, else by the graph, where it shows one."""
        shown = isinstance(self.product.kind, Embedding) or self.bias is not None
        if self.known_bias != "unknown" or not shown:
            return self.known_bias
        return "none" if isinstance(self.product.kind, Embedding) else "added"

    @property
    def adds_more(self) -> bool:
        """Whether a Gemm adds what is no bias: computed, or of another shape."""
        return self.node.op_type == "Gemm" and self.bias is None and len(self.node.inputs) > 2

    def window(self) -> Array:
        """The module's own weight `[in, outputs]`."""
        return self.product.values()[:, self.start : self.start + self.outputs]


@dataclass(frozen=True, slots=True)
class Stray:
    """A node with a weight that gets no point, why, and the modules it may belong to: they get none either.

    `other_weight`: what it computes with may not be the modules' weights and biases, which nothing may take the place
    of then.
    """

    node: str
    reason: str
    modules: tuple[str, ...]
    other_weight: bool = False


@dataclass(frozen=True, slots=True)
class Located:
    """What `locate` found in one graph, in its order: linear nodes by module, and nodes without a place."""

    linears: tuple[Occurrence, ...]
    strays: tuple[Stray, ...]

    def under(self, prefix: str) -> Located:
        """The same with `prefix` before every module's name."""
        return Located(
            tuple(replace(one, module=prefix + one.module, guess=prefix + one.guess) for one in self.linears),
            tuple(replace(one, modules=tuple(prefix + name for name in one.modules)) for one in self.strays),
        )

    def without(self, reasons: Mapping[str, str], *, other_weight: bool) -> Located:
        """The same, but that these modules have no place: why, by module."""
        gone = [one for one in self.linears if one.module in reasons]
        strays = tuple(Stray(label_of(one.node), reasons[one.module], (one.module,), other_weight) for one in gone)
        kept = tuple(one for one in self.linears if one.module not in reasons)
        return Located(kept, (*self.strays, *strays))

    def doubted(self, graph: ir.Graph, traces: Traces, *, named: bool) -> Located:
        """The same, unproven where an optimiser, or the module itself, may compute something else. `named`: nothing but
        names told."""
        surroundings = Surroundings.of(graph, [one.product for one in self.linears])
        placed = {one.module for one in self.linears}
        doubted: list[Occurrence] = []
        for one in self.linears:
            doubt = traces.of_calls(one.product)
            # Of two modules that compute the same an exporter makes one.
            if not doubt and (lost := [twin for twin in one.twins if twin not in placed]):
                doubt = f"{lost[0]} has the same weight and no node of its own: this one may stand for both"
            if not doubt and not traces.built:
                doubt = surroundings.doubt(one.product)
            if not doubt and surroundings.in_parent(one.product, one.module):
                doubt = _IN_PARENT
            if not doubt and named:
                doubt = traces.of_weight(one.product)
            doubted.append(replace(one, unproven=one.unproven or doubt))
        return replace(self, linears=tuple(doubted))

    def counted(self, graph: ir.Graph, calls: Calls) -> Located:
        """The same without the modules that torch calls more or less often than the graph does, or that are no x · W0.

        Fewer nodes: a call has become a constant. More: something else computes with the weight, and would take the
        adapter along that PEFT leaves out there.
        """
        surroundings = Surroundings.of(graph, [one.product for one in self.linears])
        nodes = Counter(one.module for one in self.linears if one.first == 0)
        reasons: dict[str, str] = {}
        for one in self.linears:
            reason = calls.doubt(one.module, nodes)
            if not reason and one.module in calls.overridden:
                reason = surroundings.beside(one.product)
            if not reason and surroundings.in_parent(one.product, one.module):
                reason = _IN_PARENT
            if reason:
                reasons[one.module] = reason
        return self.without(reasons, other_weight=True)


# Why a product is no call of the module whose weight it multiplies with.
_IN_PARENT = "the module around it computes with its weight, and PEFT's delta is beside the module alone"


def label_of(node: ir.Node) -> str:
    """A node's name, or what stands for it."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


def same_weight(one: Occurrence, other: Occurrence) -> bool:
    """Whether two nodes multiply with the same values for their module."""
    first, second = one.product, other.product
    same = [own.value for own in first.operands] == [own.value for own in second.operands]
    if same and (first.transposed, one.start, _scheme(first)) == (second.transposed, other.start, _scheme(second)):
        return one.outputs == other.outputs
    return np.array_equal(one.window(), other.window())


def _scheme(product: Product) -> Scheme | None:
    return None if product.quantized is None else product.quantized.scheme
