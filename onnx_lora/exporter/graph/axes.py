"""Where the batch axis of a value lies: shapes with symbols, for every value of a graph.

The arithmetic of shapes is ONNX Runtime's own tool. This file asks it, and interprets its answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir

from onnx_lora.errors import printable
from onnx_lora.exporter.foreign_libraries import Failure, attempt
from onnx_lora.exporter.graph.placement import Form
from onnx_lora.onnxruntime_errors import load_onnxruntime

__all__ = ["Shapes", "infer_shapes", "outputs_are_free"]

logger = logging.getLogger(__name__)

# How often the tool begins anew, having found two sizes to be equal. Graphs of models need three; of damaged ones it
# never ends.
_ROUNDS = 32

# Stands for "any number of outputs" while a head is tried.
_FREE = "onnx_lora_free_outputs"

# Begins the symbols that ONNX's shape inference makes up.
_MADE_UP = "unk__"

Shape = tuple[int | str | None, ...]

# Operators that compute each row of a 2-D value from the same row of their first input alone.
_ROW_BY_ROW = frozenset(
    [
        *("Abs", "Add", "BiasGelu", "Cast", "Clip", "Div", "Dropout", "Elu", "Erf", "FastGelu", "Gelu", "Gemm"),
        *("HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "LeakyRelu", "MatMul", "Mish", "Mul", "Neg"),
        *("Pow", "QuickGelu", "Relu", "RMSNormalization", "Selu", "Sigmoid", "SimplifiedLayerNormalization"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Softmax", "Softplus", "Sqrt", "Sub", "Tanh"),
    ]
)


@dataclass(frozen=True)
class Shapes:
    """Inferred shapes by value name, and the symbols that mean the batch size.

    `batch` is empty where they are not certain: then every value is `OTHER`. `plain`: what ONNX's own rules, which
    every runtime follows, say of values. They never take two symbols for one size, and say no more than a runtime
    knows of the graph without points: with more, it would fuse other nodes, and rank 0 would differ in its last bit.
    """

    by_name: Mapping[str, Shape]
    batch: frozenset[str]
    plain: Mapping[str, onnx.TypeProto] = field(default_factory=dict)

    def state(self, value: ir.Value) -> None:
        """Write down the type and shape of `value`, by ONNX's own rules, where the graph does not say them."""
        found = self.plain.get(value.name or "")
        if value.shape is None and found is not None:
            value.type = ir.serde.deserialize_type_proto_for_type(found)
            value.shape = ir.serde.deserialize_type_proto_for_shape(found)

    def rank(self, value: ir.Value) -> int | None:
        """The number of axes of `value`, or None where it cannot be told."""
        shape = self._shape(value)
        return None if shape is None else len(shape)

    def form(self, value: ir.Value) -> Form:
        """How the batch lies in `value`. `OTHER` unless another form is certain."""
        shape = self._shape(value)
        if shape is None or len(shape) < 2:
            return Form.OTHER
        if shape[0] in self.batch:
            return Form.POOLED if len(shape) == 2 else Form.BATCHED
        if len(shape) == 2 and self.flattened_by(value) is not None:
            return Form.FLATTENED
        return Form.OTHER

    def flattened_by(self, value: ir.Value) -> ir.Node | None:
        """The Reshape that merged batch and positions to make the rows of `value` `[batch · n, features]`."""
        rows = self._shape(value)
        if rows is None:
            return None
        while True:
            node = value.producer()
            if node is None or node.inputs[0] is None:
                return None
            source = node.inputs[0]
            shape = self._shape(source)
            if not shape:
                return None
            if node.op_type == "Reshape":
                flat = self._shape(value)
                is_batched = len(shape) > 2 and shape[0] in self.batch
                keeps_features = flat is not None and shape[-1] == flat[-1]
                return node if is_batched and keeps_features else None
            if node.op_type not in _ROW_BY_ROW or len(shape) != 2 or shape[0] != rows[0]:
                return None
            value = source

    def is_like(self, value: ir.Value, source: ir.Value, last: int) -> bool:
        """Whether `value` has the axes of `source`, the last one `last` long: known, and equal."""
        shape, expected = self._shape(value), self._shape(source)
        if shape is None or expected is None or None in shape:
            return False
        return shape == (*expected[:-1], last)

    def _shape(self, value: ir.Value) -> Shape | None:
        return self.by_name.get(value.name or "")


def infer_shapes(model: ir.Model) -> Shapes:
    """Infer every value's shape. Weights need not be in memory.

    Raises MissingDependencyError: onnxruntime or sympy is not installed.
    """
    proto = _without_weights(ir.to_proto(model))
    plain = {value.name: _without_made_up(value.type) for value in _infer_plainly(proto).value_info}
    inferred, certain = _infer(proto)
    by_name: dict[str, Shape] = {}
    for value in [*inferred.value_info, *inferred.input, *inferred.output]:
        known = _read(value)
        if known is not None:
            by_name[value.name] = known
    return Shapes(by_name, _find_batch(model, by_name) if certain else frozenset(), plain)


def _find_batch(model: ir.Model, shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The symbol that means the batch size: the first axis of every input that has several; nothing where that is not
    certain."""
    leading: set[str] = set()
    others: set[int | str | None] = set()
    for value in model.graph.inputs:
        shape = shapes.get(value.name or "", ())
        if len(shape) > 1:
            others.update(shape[1:])
            if isinstance(shape[0], str):
                leading.add(shape[0])
    # A symbol that stands for another axis too says nothing about the batch. And two symbols are two batches (texts and
    # images): their rows need not belong to each other.
    if leading & others or len(leading) != 1:
        return frozenset()
    return frozenset(leading)


def outputs_are_free(model: ir.Model, weights: Mapping[str, int], outputs: Sequence[str]) -> bool:
    """Whether the given weights may grow along the given axis, by what their sizes do to graph `outputs`.

    weights: axis by initializer name. True if the last axis of every output takes on the new size, and
    nothing between counts on the old one.
    """
    proto = _without_weights(ir.to_proto(model))
    for value in proto.graph.input:
        if value.name in weights:
            value.type.tensor_type.shape.dim[weights[value.name]].dim_param = _FREE
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred, certain = _infer(proto)
    shapes = {value.name: _read(value) for value in inferred.output}
    for name in outputs:
        shape = shapes.get(name)
        if not shape or shape[-1] != _FREE:
            return False
    return certain


def _infer(proto: onnx.ModelProto) -> tuple[onnx.GraphProto, bool]:
    """The graph with shapes, and whether they are all there."""
    part = "tools.symbolic_shape_infer"
    library = load_onnxruntime("giving a graph its points needs", part=part, extra="attach,cpu")
    tool = logging.getLogger("onnxruntime.tools.symbolic_shape_infer")
    level = tool.level
    tool.setLevel(logging.ERROR)
    try:
        inferred = attempt(lambda: _infer_symbolically(library.SymbolicShapeInference, proto))
    finally:
        tool.setLevel(level)
    if isinstance(inferred, Failure):  # only rows are lost without it
        logger.warning(
            "symbolic shape inference gave up (%s): no adapter per row in this graph",
            printable(str(inferred.error), 300),
        )
        return _infer_plainly(proto), False
    return inferred, True


def _infer_symbolically(tool: Any, proto: onnx.ModelProto) -> onnx.GraphProto:
    """Run ONNX Runtime's `SymbolicShapeInference` by its inner steps: its public entry point leaves a file in the
    working folder when it gives up. `tests/exporter/test_private_tools.py` says where to look when they move."""
    # auto_merge: two symbols that meet in an elementwise operator are one size.
    inference = tool(2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0)
    inference._preprocess(proto)
    rounds = 0
    while inference.run_:
        rounds += 1
        if rounds > _ROUNDS:
            raise RuntimeError("it finds sizes to be equal over and over again")
        inference._infer_impl()
    inference._update_output_from_vi()
    graph: onnx.GraphProto = inference.out_mp_.graph
    return graph


def _infer_plainly(proto: onnx.ModelProto) -> onnx.GraphProto:
    """The graph with the shapes that ONNX's own rules give."""
    try:
        return onnx.shape_inference.infer_shapes(proto).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        logger.debug("ONNX's shape inference gave up: %s", error)
        return proto.graph


def _without_made_up(kind: onnx.TypeProto) -> onnx.TypeProto:
    """A type without the symbols that ONNX's tool, unlike a runtime, makes up for sizes it does not know."""
    for dim in kind.tensor_type.shape.dim if kind.HasField("tensor_type") else ():
        if dim.dim_param.startswith(_MADE_UP):
            dim.ClearField("dim_param")
    return kind


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its external weights as inputs: shapes depend on their shapes, never on their values."""
    external = [tensor for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    inline = [tensor for tensor in proto.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    shapes = {tensor.name: list(tensor.dims) for tensor in external}
    for tensor in external:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inline)
    for node in proto.graph.node:
        if node.op_type == "GatherBlockQuantized":
            _unpack_table(proto.graph, node, shapes)
    return proto


def _unpack_table(graph: onnx.GraphProto, node: onnx.NodeProto, weights: Mapping[str, Sequence[int]]) -> None:
    """Let a quantized Gather read a table of floats: the tool takes its packed bytes for features."""
    size = next((attribute.i for attribute in node.attribute if attribute.name == "block_size"), 128)
    scales = list(weights.get(node.input[2], ()))
    if len(scales) == 2:
        name = f"{node.input[0]}.onnx_lora_unpacked"
        graph.input.append(onnx.helper.make_tensor_value_info(name, 1, [scales[0], scales[1] * size]))
        node.op_type, node.domain = "Gather", ""
        del node.attribute[:]
        node.input[:] = [name, node.input[1]]


def _read(value: onnx.ValueInfoProto) -> Shape | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in value.type.tensor_type.shape.dim
    )
