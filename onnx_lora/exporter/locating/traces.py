"""What a graph shows of having been changed after its export: its weights may then be others than the modules', and
calls of modules may have become constants. It reads names and marks; it knows no module's weight.

Decided by trying the tools: ONNX Runtime at every level and its transformers optimiser, onnxsim, onnxslim,
onnxoptimizer and ONNX Runtime's quantizers, on graphs of torch.onnx (both ways), Optimum and the GenAI builder. Plain
exports show none of this."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.graph.product import Product
from onnx_lora.exporter.graph.scopes import has_fused_norm, module_around, scopes_around
from onnx_lora.exporter.graph_kinds.graph_kind import (
    GraphKind,
    graph_kind_of,
    graph_kinds,
    kind_of_call,
    kind_of_fused,
)
from onnx_lora.points import Array

__all__ = ["Traces", "find_traces"]

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
_CALL = re.compile(r"(?P<function>[a-z]\w*?)(_(?P<count>\d+))?")

# What ONNX Runtime's quantizers put behind a Gemm's name for the product and the sum that they make of it.
_OF_GEMM = re.compile(r"_(MatMul(_\w+)?|Add)$")

# How dynamo names nodes, and what it writes down of every parameter.
_DYNAMO_NODE = "node_"
_INPUT_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"

_QUANTIZED = (
    "the graph is quantized, and quantizers may move a scale of a weight's inputs into the layer before it (AWQ, "
    "SmoothQuant)"
)

# Rows of a constant that are looked for in a table.
_ROWS = 64


@dataclass(frozen=True)
class Traces:
    """What may be otherwise than the modules say; empty where nothing shows it.

    `rewritten`: who may have put other weights into the graph. `folded`: by a kind's name, what may stand for calls of
    modules that are not there any more. `constants`: what may be rows of some embedding. `built`: by a builder that
    rounds weights to nearest, and does nothing else to them. `quantized`: whether weights of products are.
    """

    rewritten: str = ""
    folded: Mapping[str, str] = field(default_factory=dict)
    constants: tuple[ir.Value, ...] = ()
    built: bool = False
    quantized: bool = False

    def of_calls(self, product: Product) -> str:
        """Why calls of the module behind a product may be gone, or nothing."""
        if product.kind.name in self.folded:
            return self.folded[product.kind.name]
        if self.built or not graph_kind_of(product).looks_up:
            return ""
        for value in self.constants:
            if _width_of(value) != product.outputs:
                continue
            # The rows of a quantized table are not those that were looked up before.
            if product.quantized is not None or _has_rows_of(value, product.values()):
                return f"the constant {value.name} may be what a call of it gave"
        return ""

    def of_whole_weights(self) -> str:
        """Why a weight that no product multiplies with (a norm's, say) may be another than the model's, or nothing."""
        if self.rewritten or self.built:
            return self.rewritten
        for value in self.constants:
            if _axes_of(value) > 1 and value.name:
                return f"the constant {value.name} may stand for another use of it"
        for reason in self.folded.values():
            return reason
        return _QUANTIZED if self.quantized else ""

    def of_weight(self, product: Product) -> str:
        """Why a product's weight may be another than its module's, where nothing but names tell; or nothing."""
        if self.rewritten:
            return self.rewritten
        name = product.weight.value.name or ""
        # onnxslim names what it multiplies in after the node's output.
        by_onnxslim = name == f"{product.node.outputs[0].name}_weight"
        if by_onnxslim or _FUSED_NAME.fullmatch(name) or _folded_place(product.weight.value) is not None:
            return f"its weight {name} was computed by an optimiser"
        # What is looked up has no inputs to scale.
        has_inputs = not graph_kind_of(product).looks_up
        return _QUANTIZED if product.quantized is not None and has_inputs and not self.built else ""


def find_traces(model: ir.Model, products: Sequence[Product], known: Collection[str]) -> Traces:
    """Read a graph as its exporter, or whoever came after, left it.

    products: those that are modules'. known: names that parameters have for certain.
    """
    rewritten = _find_rewriter(model)
    weights: set[ir.Value] = set()
    for product in products:
        if _is_modules_own(product):
            weights.update(operand.value for operand in product.operands)
    constants: list[ir.Value] = []
    for value in model.graph.initializers.values():
        if _may_be_a_result(value) and value not in weights and value.name not in known:
            constants.append(value)
    folded: dict[str, str] = {}
    for kind, reason in _find_named_results(model.graph, constants, saved_by_ort=bool(rewritten)):
        folded.setdefault(kind, reason)
    for kind, reason in _find_missing_calls(model.graph):
        folded.setdefault(kind, reason)
    return Traces(
        rewritten=rewritten,
        folded=folded,
        constants=tuple(value for value in constants if not _is_called_parameter(value)),
        built=model.producer_name in _BUILDERS,
        quantized=any(one.quantized is not None and not graph_kind_of(one).looks_up for one in products),
    )


def _find_rewriter(model: ir.Model) -> str:
    if model.producer_name in _PRODUCERS:
        return f"the graph was rewritten by {_PRODUCERS[model.producer_name]}"
    if any(key.startswith(_ONNXSIM) for key in model.metadata_props):
        return "the graph was rewritten by onnxsim"
    if set(model.opset_imports) & _SAVED_BY_ORT:
        return "the graph was optimised and saved by ONNX Runtime"
    return ""


def _find_named_results(
    graph: ir.Graph, constants: Sequence[ir.Value], *, saved_by_ort: bool
) -> Iterator[tuple[str, str]]:
    """Constants whose name says that they stand for a call of a module, or may: a kind's name, and why."""
    by_dynamo = any((node.name or "").startswith(_DYNAMO_NODE) for node in graph)
    for value in constants:
        reason = f"the constant {value.name} may stand for a call of a module"
        call = None
        if by_dynamo and _INPUT_KIND not in value.metadata_props:
            call = _read_call(value.name or "")
        if call is not None:
            # What a lookup gave is known by its rows.
            if not call.graph_kind.looks_up:
                yield call.graph_kind.name, reason
            continue
        is_table = saved_by_ort and _axes_of(value) > 1 and not _is_called_parameter(value, anonymous=True)
        if is_table or _folded_place(value) is not None:
            for graph_kind in graph_kinds():
                yield graph_kind.name, reason


def _find_missing_calls(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """The numbers that are left out where dynamo counted the calls of torch's functions: more of them than calls that
    it fused with a norm. What a lookup gave keeps its name."""
    counts: dict[str, set[int]] = {}
    kinds: dict[str, GraphKind] = {}
    fused: Counter[str] = Counter()
    calls: list[_Call] = []
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if has_fused_norm(node):
            fused[kind_of_fused(node.op_type).name] += 1
        for name in _call_names(node):
            call = _read_call(name)
            if call is not None:
                calls.append(call)
    for name in graph.initializers:
        call = _read_call(name)
        if call is not None and call.graph_kind.looks_up:
            calls.append(call)
    for call in calls:
        counts.setdefault(call.function, set()).add(call.count)
        kinds[call.function] = call.graph_kind
    for function, seen in counts.items():
        kind = kinds[function].name
        missing = [count for count in range(max(seen)) if count not in seen]
        if len(missing) > fused[kind]:
            name = f"{function}_{missing[-1]}" if missing[-1] else function
            yield kind, f"torch.onnx counted a call {name} that is not in the graph"


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a torch function that computes a module, as dynamo names it: the function, and which call of it."""

    function: str
    count: int
    graph_kind: GraphKind


def _read_call(name: str) -> _Call | None:
    """The call that a name means, or None: another function's, or no call's."""
    match = _CALL.fullmatch(name)
    if match is None:
        return None
    graph_kind = kind_of_call(match["function"])
    if graph_kind is None:
        return None
    return _Call(match["function"], int(match["count"] or 0), graph_kind)


def _is_modules_own(product: Product) -> bool:
    """Whether a product's weight is its module's, maybe turned; not what an optimiser computed elsewhere."""
    if not module_around(product.node) and not _is_called_parameter(product.weight.value):
        return False
    place = _folded_place(product.weight.value)
    if place is None:
        return True
    own_place = (product.node.name or "").rpartition("/")[0]
    return place != "" and place == own_place


def _folded_place(value: ir.Value) -> str | None:
    """Where the node stood in whose place a constant is, or None: it is in no node's place."""
    match = _FOLDED_NODE.fullmatch(value.name or "")
    if match is None or match["kind"] == "Constant":
        return None
    return (match[1] or "").rstrip("/")


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
    names = list(scopes_around(node)[-1:])
    own = node.name or ""
    if own.startswith(_DYNAMO_NODE):
        names.append(_OF_GEMM.sub("", own.removeprefix(_DYNAMO_NODE)))
    return [name for name in names if name]


def _may_be_a_result(value: ir.Value) -> bool:
    """Whether a constant may be what a module computed: floats, and more than one."""
    if value.dtype is None or not value.dtype.is_floating_point() or value.const_value is None:
        return False
    return value.shape is not None and value.shape.is_static() and math.prod(value.shape.numpy()) > 1


def _is_called_parameter(value: ir.Value, *, anonymous: bool = False) -> bool:
    """Whether a constant is called as exporters call parameters; `anonymous`: those of TorchScript's too, which may be
    anything that it computed."""
    name = value.name or ""
    if anonymous and name.startswith("onnx::"):
        return True
    return "." in name and "/" not in name


def _width_of(value: ir.Value) -> int:
    """The length of the last axis; 0 of a scalar."""
    if value.shape is None or not _axes_of(value):
        return 0
    return int(value.shape.numpy()[-1])


def _axes_of(value: ir.Value) -> int:
    return 0 if value.shape is None else value.shape.rank()
