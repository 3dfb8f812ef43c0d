"""What a graph computes around a product, in the module that it is computed in, where exporters write that down."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.exporter.graph.product import Product
from onnx_lora.exporter.graph.scopes import classes_around, module_around
from onnx_lora.exporter.graph.values import WRAPPERS, initializer_behind
from onnx_lora.exporter.graph_kinds.graph_kind import graph_kind_of

__all__ = ["Surroundings"]

# The classes that compute x · W0 and no more, as dynamo writes them down. PEFT knows of the scale that the last ones
# multiply in.
_PLAIN_CLASS = re.compile(
    r"torch\.nn\.modules\..+|transformers\..+\.(Conv1D|FalconLinear|\w+DepthwiseConv2d|\w+ScaledWordEmbedding)"
)

# What may stand beside the product in a module that computes x · W0 and no more.
_OF_AXES = frozenset(["Constant", "Reshape", "Shape", "Squeeze", "Unsqueeze"])
_OF_QUANTIZATION = frozenset(["DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"])
_HARMLESS = WRAPPERS | _OF_AXES | _OF_QUANTIZATION

# What begins arithmetic of shapes, what it is made of, and how many nodes it has at most.
_OF_SHAPES = frozenset(["Constant", "ConstantOfShape", "Shape"])
_ON_SHAPES = frozenset(["Cast", "Concat", "Gather", "Mul", "ReduceProd", "Slice", "Squeeze", "Unsqueeze"])
_LONGEST = 32

_BEHIND = "and PEFT adds its delta behind all of that"


@dataclass(frozen=True)
class Surroundings:
    """The nodes of a graph by the module that they are computed in, where exporters write that down.

    `products`: the nodes that multiply with modules' weights; `outputs`: what they give.
    """

    nodes: Mapping[str, Sequence[ir.Node]]
    products: frozenset[ir.Node]
    outputs: frozenset[ir.Value]

    @staticmethod
    def of(graph: ir.Graph, products: Sequence[Product]) -> Surroundings:
        """Read a graph, in which `products` are modules'."""
        nodes: dict[str, list[ir.Node]] = {}
        for node in ir.traversal.RecursiveGraphIterator(graph):
            module = module_around(node)
            if module:
                nodes.setdefault(module, []).append(node)
        outputs = frozenset(product.output for product in products)
        return Surroundings(nodes, frozenset(product.node for product in products), outputs)

    def doubt(self, product: Product) -> str:
        """Why the module around a product may compute more than x · W0, or nothing."""
        classes = classes_around(product.node)
        if len(classes) > 2 and not _PLAIN_CLASS.fullmatch(classes[-2]):
            return f"its class {classes[-2]} may compute more than x · W0, {_BEHIND}"
        return self.beside(product)

    def beside(self, product: Product) -> str:
        """What else the module around a product computes, or nothing. Of embeddings PEFT knows of a scale."""
        module = module_around(product.node)
        if not module or graph_kind_of(product).looks_up:
            return ""
        for node in self.nodes.get(module, ()):
            if not self._is_harmless(node):
                return f"its module computes a {node.op_type} ({node.name}) beside x · W0, {_BEHIND}"
        return ""

    def in_parent(self, product: Product, module: str) -> bool:
        """Whether a product with a module's weight is computed by a module around that one, which PEFT leaves out."""
        around = module_around(product.node)
        return bool(around) and module.startswith(f"{around}.")

    def _is_harmless(self, node: ir.Node) -> bool:
        if node in self.products or node.op_type in _HARMLESS or _is_of_shapes(node):
            return True
        if node.op_type != "Add":
            return False
        # A bias, behind the product.
        others = [value for value in node.inputs if value is not None and value not in self.outputs]
        return len(others) == 1 and _is_constant(others[0])


def _is_of_shapes(node: ir.Node) -> bool:
    """Whether a node computes with shapes alone: what leads to it begins with Shape, and is short."""
    waiting, seen = [node], set[ir.Node]()
    while waiting:
        one = waiting.pop()
        if one.op_type in _OF_SHAPES or one in seen:
            continue
        seen.add(one)
        if one.op_type not in _ON_SHAPES or len(seen) > _LONGEST:
            return False
        for value in one.inputs:
            if value is None or _is_constant(value):
                continue
            maker = value.producer()
            if maker is None:
                return False
            waiting.append(maker)
    return True


def _is_constant(value: ir.Value) -> bool:
    """Whether it is an initializer, as it is or cast or turned, or a Constant's."""
    if initializer_behind(value) is not None:
        return True
    maker = value.producer()
    return maker is not None and maker.op_type == "Constant"
