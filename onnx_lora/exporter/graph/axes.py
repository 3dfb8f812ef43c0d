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

# How many rounds the tool may take: it begins anew whenever it has found two sizes to be equal. Graphs of models need
# three rounds; with damaged graphs it never ends.
_ROUNDS = 32

# Stands for "any number of outputs" while a head is tried.
_FREE = "onnx_lora_free_outputs"

# How much of its shapes a graph must say to be believed.
_MOST = 0.9

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)

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
    """The inferred shapes of a graph's values, by their names, and the symbols that mean the batch size.

    `batch` is empty where the shapes are not certain; then every value is `OTHER`.
    `plain`: the types that ONNX's own rules give, which every runtime follows. They never take two symbols for one
        size. Only they are written into the graph: told more than it knows of the graph without points, a runtime
        would fuse other nodes, and rank 0 would differ from the base in the last bit.
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

    def features(self, value: ir.Value) -> int | str | None:
        """The last axis of `value`, or None where it cannot be told."""
        shape = self._shape(value)
        return shape[-1] if shape else None

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
                return node if self._merges_batch(shape, self._shape(value)) else None
            keeps_rows = node.op_type in _ROW_BY_ROW and len(shape) == 2 and shape[0] == rows[0]
            if not keeps_rows:
                return None
            value = source

    def _merges_batch(self, shape: Shape, flat: Shape | None) -> bool:
        """Whether a Reshape from `shape` to `flat` makes rows of the batch and axes behind it. The features are the
        last axis, or several that it merges: attention's heads."""
        if flat is None or shape[0] not in self.batch:
            return False
        features = 1
        for axis in range(len(shape) - 1, 1, -1):
            size = shape[axis]
            if size == flat[-1] and features == 1:
                return True
            if not isinstance(size, int):
                return False
            features *= size
            if features == flat[-1]:
                return True
        return False

    def is_like(self, value: ir.Value, source: ir.Value, last: int) -> bool:
        """Whether `value` has the axes of `source`, the last one `last` long: known, and equal."""
        shape = self._shape(value)
        expected = self._shape(source)
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
    declared = {value.name: shape for value in proto.graph.value_info if (shape := _read(value)) is not None}
    plain: dict[str, onnx.TypeProto] = {}
    for value in _infer_plainly(proto).value_info:
        plain[value.name] = _without_made_up(value.type)
    told = _Told.of(proto, declared)
    inferred, certain = _infer(proto, is_needed=not told.all)
    by_name: dict[str, Shape] = {}
    for value in [*inferred.value_info, *inferred.input, *inferred.output]:
        known = _read(value)
        if known is not None:
            by_name[value.name] = known
    # Where all of it can be believed it is better than what is inferred: operators may be unknown, or sizes divided.
    by_name = {**by_name, **told.shapes} if told.all else {**told.shapes, **by_name}
    batch = _find_batch(model, by_name) if certain or told.all else frozenset[str]()
    return Shapes(by_name, batch, plain)


@dataclass(frozen=True)
class _Told:
    """The shapes that a graph says itself and that can be believed. `all`: of every value, as graphs of torch.export
    say them, and ONNX's own rules find nothing else."""

    shapes: Mapping[str, Shape]
    all: bool

    @staticmethod
    def of(proto: onnx.ModelProto, declared: Mapping[str, Shape]) -> _Told:
        outputs = [name for node in proto.graph.node for name in node.output if name]
        count = sum(name in declared for name in outputs) + len(proto.graph.output)
        if count < _MOST * len(outputs):
            return _Told({}, all=False)
        wrong = _contradicted(proto, declared)
        if any(wrong.values()):
            return _Told({}, all=False)
        # GenAI's builder says of numbers for shapes that they have no axis.
        right = {name: shape for name, shape in declared.items() if name not in wrong}
        return _Told(right, all=not wrong)


def _contradicted(proto: onnx.ModelProto, declared: Mapping[str, Shape]) -> dict[str, bool]:
    """The values of which ONNX's own rules find another shape than is declared; by each whether it is of floats."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.value_info[:]
    found: dict[str, bool] = {}
    for value in _infer_plainly(bare).value_info:
        shape = _read(value)
        if shape is not None and value.name in declared and _contradict(shape, declared[value.name]):
            found[value.name] = value.type.tensor_type.elem_type in _FLOATS
    return found


def _contradict(one: Shape, other: Shape) -> bool:
    """Whether two shapes cannot be the same value's: of other lengths, or with other numbers, or another first axis."""
    if len(one) != len(other):
        return True
    pairs = list(zip(one, other, strict=True))
    for left, right in pairs:
        if isinstance(left, int) and isinstance(right, int) and left != right:
            return True
    if not pairs:
        return False
    first, second = pairs[0]
    is_known = isinstance(first, str) and not first.startswith(_MADE_UP)
    return is_known and second is not None and first != second


def _find_batch(model: ir.Model, shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The symbol that means the batch size: the first axis of every input that has two axes or more. Nothing where that
    is not certain."""
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
    """Whether weights may grow along an axis, because the graph's `outputs` grow with them.

    weights: the axis, by the initializer's name. The answer is True if the last axis of every output takes on the new
    size, and nothing between counts on the old one.
    """
    proto = _without_weights(ir.to_proto(model))
    for value in proto.graph.input:
        if value.name in weights:
            axis = weights[value.name]
            value.type.tensor_type.shape.dim[axis].dim_param = _FREE
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred, certain = _infer(proto)
    shapes = {value.name: _read(value) for value in inferred.output}
    for name in outputs:
        shape = shapes.get(name)
        if not shape or shape[-1] != _FREE:
            return False
    return certain


def _infer(proto: onnx.ModelProto, *, is_needed: bool = True) -> tuple[onnx.GraphProto, bool]:
    """The graph with shapes, and whether ONNX Runtime's tool found all of them. Where it is not needed, ONNX's own
    rules do."""
    if not is_needed:
        return _infer_plainly(proto), False
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
    if not kind.HasField("tensor_type"):
        return kind
    for dim in kind.tensor_type.shape.dim:
        if dim.dim_param.startswith(_MADE_UP):
            dim.ClearField("dim_param")
    return kind


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its external weights as inputs: other shapes depend on their shapes, never on their values."""
    inline: list[onnx.TensorProto] = []
    shapes: dict[str, list[int]] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inline.append(tensor)
            continue
        shapes[tensor.name] = list(tensor.dims)
        weight = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(weight)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inline)
    for node in proto.graph.node:
        if node.op_type == "GatherBlockQuantized":
            _unpack_table(proto.graph, node, shapes)
    return proto


def _unpack_table(graph: onnx.GraphProto, node: onnx.NodeProto, weights: Mapping[str, Sequence[int]]) -> None:
    """Let a quantized Gather read a table of floats: the tool takes its packed bytes for features."""
    scales = weights.get(node.input[2], ())
    if len(scales) != 2:
        return
    block_size = 128
    for attribute in node.attribute:
        if attribute.name == "block_size":
            block_size = attribute.i
    rows, blocks = scales
    name = f"{node.input[0]}.onnx_lora_unpacked"
    table = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [rows, blocks * block_size])
    graph.input.append(table)
    node.op_type = "Gather"
    node.domain = ""
    del node.attribute[:]
    node.input[:] = [name, node.input[1]]


def _read(value: onnx.ValueInfoProto) -> Shape | None:
    """A value's axes: lengths, symbols, and None for an axis of which nothing is known. None: not even the number of
    axes is known."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    axes: list[int | str | None] = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.HasField("dim_value"):
            axes.append(dim.dim_value)
        else:
            axes.append(dim.dim_param or None)
    return tuple(axes)
