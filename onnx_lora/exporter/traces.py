"""What a graph shows of having been changed after its export: its weights may then be others than the modules', and
calls of modules may have become constants. It reads names and marks; it knows no module's weight.

Decided by trying the tools: ONNX Runtime at every level and its transformers optimiser, onnxsim, onnxslim,
onnxoptimizer and ONNX Runtime's quantisers, on graphs of torch.onnx (both ways), Optimum and the GenAI builder. Plain
exports show none of this."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_lora.exporter.products import Product
from onnx_lora.exporter.scopes import classes_around, path_of, scopes_around
from onnx_lora.points import Array, Kind

__all__ = ["Traces", "find_traces", "module_doubt"]

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
_FUSED = re.compile(r".*Fusion_.+")

# torch.onnx (dynamo) calls nodes after the calls of torch's functions, counted from 0: `linear`, `linear_1`, ...
_CALL = re.compile(r"(?P<function>linear|addmm|mm|conv[123]d|convolution|embedding)(_(?P<count>\d+))?")

# The classes that compute x · W0 and no more, as dynamo writes them down. PEFT knows of the scale that the last ones
# multiply in.
_PLAIN_CLASS = re.compile(
    r"torch\.nn\.modules\..+|transformers\..+\.(Conv1D|FalconLinear|\w+DepthwiseConv2d|\w+ScaledWordEmbedding)"
)

# What a module that computes x · W0 and no more may hold beside the product, by TorchScript's names.
_PLAIN_NODES = frozenset(
    [
        *("Add", "Cast", "Identity", "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"),
        *("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"),
    ]
)

_QUANTISED = (
    "the graph is quantised, and quantisers may move a scale of a weight's inputs into the layer before it (AWQ, "
    "SmoothQuant)"
)

_KINDS: tuple[Kind, ...] = ("linear", "embedding", "conv")


@dataclass(frozen=True)
class Traces:
    """What may be otherwise than the modules say; empty where nothing shows it.

    `rewritten`: who may have put other weights into the graph. `folded`: by kind, what may stand for calls of modules
    that are not there any more; `lookups`: constants that are known to be rows of some embedding.
    """

    rewritten: str = ""
    folded: Mapping[Kind, str] = field(default_factory=dict)
    lookups: tuple[ir.Value, ...] = ()
    built: bool = False  # by a builder that rounds weights to nearest, and does nothing else to them
    quantised: bool = False

    def of_calls(self, product: Product) -> str:
        """Why calls of the module behind a product may be gone, or nothing."""
        if product.kind in self.folded:
            return self.folded[product.kind]
        if product.kind == "embedding" and product.quantised is None:
            for value in self.lookups:
                if _has_rows_of(value, product.values()):
                    return f"the constant {value.name} is what a call of it gave"
        return ""

    def of_others(self) -> str:
        """Why a weight that is no product's (a norm's, say) may be another than the model's, or nothing."""
        quantised = _QUANTISED if self.quantised and not self.built else ""
        return self.rewritten or next(iter(self.folded.values()), quantised)

    def of_weight(self, product: Product) -> str:
        """Why a product's weight may be another than its module's, where nothing but names tell; or nothing."""
        if self.rewritten:
            return self.rewritten
        name = product.weight.value.name or ""
        folded = _FOLDED_NODE.fullmatch(name)
        # onnxslim names what it multiplies in after the node's output.
        slimmed = name and name == f"{product.node.outputs[0].name}_weight"
        if slimmed or _FUSED.fullmatch(name) or (folded is not None and folded["kind"] != "Constant"):
            return f"its weight {name} was computed by an optimiser"
        # What is looked up has no inputs to scale.
        scaled = product.quantised is not None and product.kind != "embedding" and not self.built
        return _QUANTISED if scaled else ""


def module_doubt(product: Product) -> str:
    """Why the module around a product may compute more than x · W0, by what exporters write down of it; or nothing."""
    classes = classes_around(product.node)
    if len(classes) > 2 and not _PLAIN_CLASS.fullmatch(classes[-2]):
        return f"its class {classes[-2]} may compute more than x · W0, {_BEHIND}"
    path = path_of(product.node)
    # Of embeddings a scale is known to PEFT.
    if path is None or product.kind == "embedding":
        return ""
    for node in _neighbours(product):
        if path_of(node) == path and node.op_type not in _PLAIN_NODES:
            return f"its module computes a {node.op_type} ({node.name}) beside x · W0, {_BEHIND}"
    return ""


_BEHIND = "and PEFT adds its delta behind all of that"


def _neighbours(product: Product) -> Iterator[ir.Node]:
    """The nodes before and behind a product and its bias."""
    maker = product.source.producer()
    if maker is not None:
        yield maker
    for use in product.output.uses():
        yield use.node
        if use.node.op_type == "Add":
            yield from (behind.node for behind in use.node.outputs[0].uses())


def find_traces(model: ir.Model, products: Sequence[Product]) -> Traces:
    """Read a graph as its exporter, or whoever came after, left it; `products`: those that are modules'."""
    who = _rewriter(model)
    folded, lookups = _folded(model.graph, products, saved_by_ort=bool(who))
    quantised = any(product.quantised is not None and product.kind != "embedding" for product in products)
    return Traces(who, folded, lookups, model.producer_name in _BUILDERS, quantised)


def _rewriter(model: ir.Model) -> str:
    if model.producer_name in _PRODUCERS:
        return f"the graph was rewritten by {_PRODUCERS[model.producer_name]}"
    if any(key.startswith(_ONNXSIM) for key in model.metadata_props):
        return "the graph was rewritten by onnxsim"
    if set(model.opset_imports) & _SAVED_BY_ORT:
        return "the graph was optimised and saved by ONNX Runtime"
    return ""


def _folded(
    graph: ir.Graph, products: Sequence[Product], *, saved_by_ort: bool
) -> tuple[dict[Kind, str], tuple[ir.Value, ...]]:
    """By kind, the first constant that may stand for a call of a module; and constants that are looked-up rows."""
    weights = {operand.value for product in products if _is_own(product) for operand in product.operands}
    constants = [value for value in graph.initializers.values() if _may_be_a_result(value) and value not in weights]
    found: dict[Kind, str] = {}
    lookups: list[ir.Value] = []
    for value in constants:
        name = value.name or ""
        node, call = _FOLDED_NODE.fullmatch(name), _CALL.fullmatch(name)
        table = saved_by_ort and _axes(value) > 1 and not _is_parameter(value)
        reason = f"the constant {name} may stand for a call of a module"
        if call is not None and _kind_of(call["function"]) == "embedding":
            lookups.append(value)
        elif call is not None:
            found.setdefault(_kind_of(call["function"]), reason)
        elif table or (node is not None and node["kind"] != "Constant"):
            for kind in _KINDS:
                found.setdefault(kind, reason)
    for kind, missing in _missing_calls(graph, {value.name or "" for value in lookups}):
        found.setdefault(kind, f"torch.onnx counted a call {missing} that is not in the graph")
    return found, tuple(lookups)


def _is_own(product: Product) -> bool:
    """Whether a product's weight is its module's, maybe turned; not what an optimiser computed elsewhere."""
    folded = _FOLDED_NODE.fullmatch(product.weight.value.name or "")
    if folded is None:
        return True
    scope = (folded[1] or "").rstrip("/")
    return scope != "" and scope == (product.node.name or "").rpartition("/")[0]


def _missing_calls(graph: ir.Graph, known: Collection[str]) -> Iterator[tuple[Kind, str]]:
    """The numbers that are left out where dynamo counted the calls of torch's functions; `known` are not missing."""
    counts: dict[str, set[int]] = {}
    names = list(known)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        names += _call_names(node)
    for name in names:
        if match := _CALL.fullmatch(name):
            counts.setdefault(match["function"], set()).add(int(match["count"] or 0))
    for function, seen in counts.items():
        for count in range(max(seen)):
            if count not in seen:
                yield _kind_of(function), f"{function}_{count}" if count else function


def _kind_of(function: str) -> Kind:
    if function == "embedding":
        return "embedding"
    return "conv" if function.startswith("conv") else "linear"


def _has_rows_of(value: ir.Value, table: Array) -> bool:
    """Whether the first row of a constant is one of a table `[entries, features]`."""
    if value.const_value is None or value.shape is None or int(value.shape.numpy()[-1]) != table.shape[1]:
        return False
    first = value.const_value.numpy().reshape(-1, table.shape[1])[:1]
    return bool((table == first).all(axis=1).any())


def _call_names(node: ir.Node) -> list[str]:
    """What dynamo calls the call behind a node: the last of its scopes, which other tools drop, and the node itself."""
    own = (node.name or "").removeprefix("node_") if (node.name or "").startswith("node_") else ""
    return [name for name in (*scopes_around(node)[-1:], own) if name]


def _may_be_a_result(value: ir.Value) -> bool:
    """Whether a constant may be what a module computed: floats, and more than one."""
    floats = value.dtype is not None and value.dtype.is_floating_point()
    return floats and value.shape is not None and value.shape.is_static() and _size(value) > 1


def _is_parameter(value: ir.Value) -> bool:
    """By how exporters call parameters, and what quantisers and fusions make of their names."""
    name = value.name or ""
    return name.startswith("onnx::") or "." in name


def _size(value: ir.Value) -> int:
    size = 1
    for dim in value.shape.numpy() if value.shape is not None else ():
        size *= dim
    return size


def _axes(value: ir.Value) -> int:
    return 0 if value.shape is None else value.shape.rank()
