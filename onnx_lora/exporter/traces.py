"""What a graph shows of having been changed after its export: its weights may then be others than the modules', and
calls of modules may have become constants. It reads names and marks; it knows no module's weight.

Decided by trying the tools: ONNX Runtime at every level and its transformers optimiser, onnxsim, onnxslim,
onnxoptimizer and ONNX Runtime's quantizers, on graphs of torch.onnx (both ways), Optimum and the GenAI builder. Plain
exports show none of this."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.products import Product, unwrap
from onnx_lora.exporter.scopes import classes_around, module_around, scopes_around
from onnx_lora.kinds import KINDS, Conv, Embedding, Linear
from onnx_lora.points import Array

__all__ = ["RULE_NAME", "Surroundings", "Traces", "find_traces"]

# What onnxscript's rewriter, behind torch.onnx (dynamo), says of a node that it made.
RULE_NAME = "pkg.onnxscript.rewriter.rule_name"

# The domains that ONNX Runtime declares in a graph it saves, whatever is in it; no exporter declares them.
_SAVED_BY_ORT = frozenset(["com.microsoft.nchwc", "ai.onnx.preview.training", "com.microsoft.experimental"])

# Who writes its own name into a graph it has changed, and what it is called.
_PRODUCERS = {"onnxruntime.transformers": "ONNX Runtime's transformers optimiser"}

# The GenAI builder writes a graph anew from a checkpoint, and rounds its weights to nearest.
_BUILDERS = frozenset(["onnxruntime-genai"])

# onnxsim's notes, one key each.
_ONNXSIM = "onnxsim."

# What folding leaves of a node of TorchScript's exporter: a constant that is called as the node's output was.
_FOLDED_NODE = re.compile(r"(.*/)?(?P<kind>[A-Za-z]+)(_\d+)?_output_\d+")

# What ONNX Runtime calls a weight into which it multiplied a batch norm or a scale.
_FUSED_NAME = re.compile(r".*Fusion_.+")

# torch.onnx (dynamo) calls nodes after the calls of torch's functions, counted from 0: `linear`, `linear_1`, ...
_CALL = re.compile(r"(?P<function>linear|addmm|mm|conv[123]d|convolution|embedding)(_(?P<count>\d+))?")

# How dynamo names nodes, and what it writes down of every parameter.
_DYNAMO_NODE = "node_"
_INPUT_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"

# The classes that compute x · W0 and no more, as dynamo writes them down. PEFT knows of the scale that the last ones
# multiply in.
_PLAIN_CLASS = re.compile(
    r"torch\.nn\.modules\..+|transformers\..+\.(Conv1D|FalconLinear|\w+DepthwiseConv2d|\w+ScaledWordEmbedding)"
)

# What may stand beside the product in a module that computes x · W0 and no more.
_HARMLESS = frozenset(
    [
        *("Cast", "Constant", "Identity", "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"),
        *("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"),
    ]
)

# What begins arithmetic of shapes, what it is made of, and how many nodes it has at most.
_OF_SHAPES = frozenset(["Constant", "ConstantOfShape", "Shape"])
_ON_SHAPES = frozenset(["Cast", "Concat", "Gather", "Mul", "ReduceProd", "Slice", "Squeeze", "Unsqueeze"])
_LONGEST = 32

_BEHIND = "and PEFT adds its delta behind all of that"

_QUANTIZED = (
    "the graph is quantized, and quantizers may move a scale of a weight's inputs into the layer before it (AWQ, "
    "SmoothQuant)"
)

# What torch calls its function that looks rows up, and dynamo its calls.
_LOOKUP = "embedding"

# Rows of a constant that are looked for in a table.
_ROWS = 64


@dataclass(frozen=True)
class Traces:
    """What may be otherwise than the modules say; empty where nothing shows it.

    `rewritten`: who may have put other weights into the graph. `folded`: by a kind's name, what may stand for calls of
    modules that are not there any more. `constants`: what may be rows of some embedding.
    """

    rewritten: str = ""
    folded: Mapping[str, str] = field(default_factory=dict)
    constants: tuple[ir.Value, ...] = ()
    built: bool = False  # by a builder that rounds weights to nearest, and does nothing else to them
    quantized: bool = False

    def of_calls(self, product: Product) -> str:
        """Why calls of the module behind a product may be gone, or nothing."""
        if product.kind.name in self.folded:
            return self.folded[product.kind.name]
        if not isinstance(product.kind, Embedding) or self.built:
            return ""
        for value in self.constants:
            if _width(value) != product.outputs:
                continue
            # The rows of a quantized table are not those that were looked up before.
            if product.quantized is not None or _has_rows_of(value, product.values()):
                return f"the constant {value.name} may be what a call of it gave"
        return ""

    def of_whole_weights(self) -> str:
        """Why a weight that no product multiplies with (a norm's, say) may be another than the model's, or nothing."""
        if self.rewritten or self.built:
            return self.rewritten
        if table := next((value.name for value in self.constants if _axes(value) > 1), None):
            return f"the constant {table} may stand for another use of it"
        return next(iter(self.folded.values()), _QUANTIZED if self.quantized else "")

    def of_weight(self, product: Product) -> str:
        """Why a product's weight may be another than its module's, where nothing but names tell; or nothing."""
        if self.rewritten:
            return self.rewritten
        name = product.weight.value.name or ""
        # onnxslim names what it multiplies in after the node's output.
        slimmed = name and name == f"{product.node.outputs[0].name}_weight"
        if slimmed or _FUSED_NAME.fullmatch(name) or _folded_node(product.weight.value) is not None:
            return f"its weight {name} was computed by an optimiser"
        # What is looked up has no inputs to scale.
        scaled = product.quantized is not None and not isinstance(product.kind, Embedding) and not self.built
        return _QUANTIZED if scaled else ""


@dataclass(frozen=True)
class Surroundings:
    """The nodes of a graph by the module that they are computed in, where exporters write that down."""

    nodes: Mapping[str, Sequence[ir.Node]]
    products: frozenset[ir.Node]
    outputs: frozenset[ir.Value]

    @staticmethod
    def of(graph: ir.Graph, products: Sequence[Product]) -> Surroundings:
        nodes: dict[str, list[ir.Node]] = {}
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if module := module_around(node):
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
        if not module or isinstance(product.kind, Embedding):
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
        # A bias, behind the product.
        others = [value for value in node.inputs if value is not None and value not in self.outputs]
        return node.op_type == "Add" and len(others) == 1 and _is_constant(others[0])


def _is_of_shapes(node: ir.Node) -> bool:
    """Whether a node computes with shapes alone: what leads to it begins with Shape, and is short."""
    waiting, seen = [node], set[ir.Node]()
    while waiting:
        one = waiting.pop()
        if one.op_type in _OF_SHAPES or one in seen:
            continue
        seen.add(one)
        makers = [value.producer() for value in one.inputs if value is not None and not _is_constant(value)]
        if one.op_type not in _ON_SHAPES or None in makers or len(seen) > _LONGEST:
            return False
        waiting += [maker for maker in makers if maker is not None]
    return True


def _is_constant(value: ir.Value) -> bool:
    """Whether it is an initializer, as it is or cast or turned, or a Constant's."""
    maker = value.producer()
    return unwrap(value)[0] is not None or (maker is not None and maker.op_type == "Constant")


def find_traces(model: ir.Model, products: Sequence[Product], known: Collection[str]) -> Traces:
    """Read a graph as its exporter, or whoever came after, left it.

    products: those that are modules'. known: names that parameters have for certain.
    """
    who = _rewriter(model)
    weights = {operand.value for product in products if _is_own(product) for operand in product.operands}
    constants = [
        value
        for value in model.graph.initializers.values()
        if _may_be_a_result(value) and value not in weights and value.name not in known
    ]
    folded: dict[str, str] = {}
    for kind, reason in (*_named_results(model.graph, constants, saved_by_ort=bool(who)), *_missing_calls(model.graph)):
        folded.setdefault(kind, reason)
    quantized = any(product.quantized is not None and not isinstance(product.kind, Embedding) for product in products)
    lookups = tuple(value for value in constants if not _is_called_parameter(value))
    return Traces(who, folded, lookups, model.producer_name in _BUILDERS, quantized)


def _rewriter(model: ir.Model) -> str:
    if model.producer_name in _PRODUCERS:
        return f"the graph was rewritten by {_PRODUCERS[model.producer_name]}"
    if any(key.startswith(_ONNXSIM) for key in model.metadata_props):
        return "the graph was rewritten by onnxsim"
    if set(model.opset_imports) & _SAVED_BY_ORT:
        return "the graph was optimised and saved by ONNX Runtime"
    return ""


def _named_results(graph: ir.Graph, constants: Sequence[ir.Value], *, saved_by_ort: bool) -> Iterator[tuple[str, str]]:
    """Constants whose name says that they stand for a call of a module, or may."""
    by_dynamo = any((node.name or "").startswith(_DYNAMO_NODE) for node in graph)
    for value in constants:
        reason = f"the constant {value.name} may stand for a call of a module"
        call = _CALL.fullmatch(value.name or "") if by_dynamo and _INPUT_KIND not in value.metadata_props else None
        table = saved_by_ort and _axes(value) > 1 and not _is_called_parameter(value, anonymous=True)
        if call is not None:
            # What a lookup gave is known by its rows.
            if _kind_of_call(call["function"]) is not Embedding:
                yield _kind_of_call(call["function"]).name, reason
        elif table or _folded_node(value) is not None:
            yield from ((kind, reason) for kind in KINDS)


def _missing_calls(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """The numbers that are left out where dynamo counted the calls of torch's functions: more of them than calls that
    it fused with a norm. What a lookup gave keeps its name."""
    counts: dict[str, set[int]] = {}
    fused: Counter[str] = Counter()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if "FuseBatchNorm" in node.metadata_props.get(RULE_NAME, ""):
            fused[(Conv if node.op_type.startswith("Conv") else Linear).name] += 1
        for name in _call_names(node):
            if match := _CALL.fullmatch(name):
                counts.setdefault(match["function"], set()).add(int(match["count"] or 0))
    for name in graph.initializers:
        if (match := _CALL.fullmatch(name)) and match["function"] == _LOOKUP:
            counts.setdefault(_LOOKUP, set()).add(int(match["count"] or 0))
    for function, seen in counts.items():
        kind = _kind_of_call(function).name
        missing = [count for count in range(max(seen)) if count not in seen]
        if len(missing) > fused[kind]:
            name = f"{function}_{missing[-1]}" if missing[-1] else function
            yield kind, f"torch.onnx counted a call {name} that is not in the graph"


def _is_own(product: Product) -> bool:
    """Whether a product's weight is its module's, maybe turned; not what an optimiser computed elsewhere."""
    if not module_around(product.node) and not _is_called_parameter(product.weight.value):
        return False
    folded = _folded_node(product.weight.value)
    return folded is None or (folded != "" and folded == (product.node.name or "").rpartition("/")[0])


def _folded_node(value: ir.Value) -> str | None:
    """Where the node stood in whose place a constant is, or None: it is in no node's place."""
    match = _FOLDED_NODE.fullmatch(value.name or "")
    return None if match is None or match["kind"] == "Constant" else (match[1] or "").rstrip("/")


def _kind_of_call(function: str) -> type[Linear] | type[Embedding] | type[Conv]:
    if function == _LOOKUP:
        return Embedding
    return Conv if function.startswith("conv") else Linear


def _has_rows_of(value: ir.Value, table: Array) -> bool:
    """Whether some of a constant's rows that are not zero are rows of a table `[entries, features]`."""
    assert value.const_value is not None  # it is an initializer
    rows = value.const_value.numpy().reshape(-1, table.shape[1])
    rows = rows[rows.any(axis=1)][:_ROWS]
    for row in rows:
        alike = np.flatnonzero(table[:, 0] == row[0])
        if (table[alike] == row).all(axis=1).any():
            return True
    return False


def _call_names(node: ir.Node) -> list[str]:
    """What dynamo calls the call behind a node: the last of its scopes, which other tools drop, and the node itself."""
    name = node.name or ""
    own = name.removeprefix(_DYNAMO_NODE) if name.startswith(_DYNAMO_NODE) else ""
    return [name for name in (*scopes_around(node)[-1:], own) if name]


def _may_be_a_result(value: ir.Value) -> bool:
    """Whether a constant may be what a module computed: floats, and more than one."""
    floats = value.dtype is not None and value.dtype.is_floating_point() and value.const_value is not None
    return floats and value.shape is not None and value.shape.is_static() and _size(value) > 1


def _is_called_parameter(value: ir.Value, *, anonymous: bool = False) -> bool:
    """Whether a constant is called as exporters call parameters; `anonymous`: those of TorchScript's too, which may be
    anything that it computed."""
    name = value.name or ""
    return ("." in name and "/" not in name) or (anonymous and name.startswith("onnx::"))


def _width(value: ir.Value) -> int:
    return 0 if value.shape is None or not _axes(value) else int(value.shape.numpy()[-1])


def _size(value: ir.Value) -> int:
    size = 1
    for dim in value.shape.numpy() if value.shape is not None else ():
        size *= dim
    return size


def _axes(value: ir.Value) -> int:
    return 0 if value.shape is None else value.shape.rank()
