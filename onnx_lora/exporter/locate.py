"""Which nodes of a graph compute which linear module, and where their weights come from. It reads
the graph and changes nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.checkpoint import Checkpoint, Match
from onnx_lora.package import Unplaced
from onnx_lora.points import FLOAT_TYPES, Array

__all__ = ["Linear", "Located", "locate", "unwrap"]

# torch.onnx (dynamo) writes the module path of every node here.
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"

# TorchScript's exporter, and the GenAI builder: `/model/layers.0/self_attn/q_proj/MatMul_1`.
_NODE_NAME = re.compile(r"/(?P<path>.+)/[A-Za-z]+(_\d+)?")

# A module called a second time gets its scope numbered: `query_1`.
_CALLED_AGAIN = re.compile(r"(?P<path>.+)_\d+")

# Operators between an initializer and the node that multiplies with it.
_WRAPPERS = ("Cast", "Identity", "Transpose")

# Operators that hold weights an adapter may mean, and that get no point yet.
_WEIGHTED = (
    "Conv",
    "ConvTranspose",
    "DynamicQuantizeMatMul",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QGemm",
    "QLinearMatMul",
)


@dataclass(frozen=True, slots=True)
class Linear:
    """A node that computes `x · W0` (and a bias, in a Gemm) for one module.

    `wrappers` lead from the node back to the initializer `weight`, nearest first. `transposed`:
    the initializer is stored `[out, in]`. `start`: the first output that is the module's own, in a
    packed projection. `in_out`: torch keeps the weight `[in, out]`.
    """

    node: ir.Node
    weight: ir.Value
    wrappers: tuple[ir.Node, ...]
    transposed: bool
    module: str
    in_features: int
    out_features: int
    start: int = 0
    in_out: bool = False

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None  # _candidate checked it
        return value

    @property
    def bias(self) -> tuple[ir.Node, int] | None:
        """The node and input position of the bias added to the product, if one is."""
        if self.node.op_type == "Gemm":
            return (self.node, 2) if len(self.node.inputs) > 2 and self.node.inputs[2] is not None else None
        uses = list(self.node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add":
            return None
        position = 1 - uses[0].idx
        initializer, _ = unwrap(uses[0].node.inputs[position])
        if initializer is None or initializer.shape is None or initializer.shape.rank() != 1:
            return None
        return uses[0].node, position

    def values(self) -> Array:
        """The node's whole weight `[in, outputs]`, of which the module's is a window."""
        assert self.weight.const_value is not None
        stored = self.weight.const_value.numpy()
        return stored.T if self.transposed else stored


@dataclass(frozen=True, slots=True)
class Located:
    """What `locate` found: linear nodes by module, in graph order, and what has no place."""

    linears: tuple[Linear, ...]
    unplaced: tuple[Unplaced, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(linear.module for linear in self.linears))


def locate(graph: ir.Graph, checkpoint: Checkpoint | None = None) -> Located:
    """Find the modules behind the nodes.

    With a checkpoint a node's weight must be one of the checkpoint's, value for value, and its name
    decides between equals. Without, the name alone does: dynamo's scopes, the node's path, the
    initializer's name.
    """
    found: list[Linear] = []
    unplaced: list[Unplaced] = []
    for node in ir.traversal.RecursiveGraphIterator(graph):
        linear = _candidate(node)
        if linear is None:
            continue
        if isinstance(linear, str):
            unplaced.append(Unplaced(_label(node), linear))
        elif node.graph is not graph:
            unplaced.append(Unplaced(_label(node), "it lies in a branch or loop body, where inputs cannot be optional"))
        else:
            found.append(linear)
    if checkpoint is None:
        return Located(tuple(_merge_calls(found)), tuple(unplaced))
    placed: list[Linear] = []
    embedded = _embedded(graph, checkpoint) if checkpoint.heads is None else frozenset[str]()
    for linear in found:
        result = _identify(linear, checkpoint, embedded)
        if isinstance(result, str):
            unplaced.append(Unplaced(_label(linear.node), result))
        else:
            placed.extend(result)
    return Located(tuple(placed), tuple(unplaced))


def unwrap(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """The initializer behind Transpose, Cast and Identity nodes, and those nodes; or None."""
    wrappers: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in _WRAPPERS:
        wrappers.append(node)
        value = node.inputs[0]
    constant = value is not None and value.is_initializer() and not value.is_graph_input()
    return (value if constant else None), tuple(wrappers)


def _candidate(node: ir.Node) -> Linear | str | None:
    """A linear node by its form alone (named by its best guess), a reason why not, or None."""
    if node.op_type in _WEIGHTED:
        return f"{node.op_type} gets no point yet"
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
        return None
    weight, wrappers = unwrap(node.inputs[1])
    if weight is None:
        left, _ = unwrap(node.inputs[0])
        return "the weight is the left factor" if left is not None and _rank(left) == 2 else None
    if _rank(weight) != 2:
        return f"the weight has {_rank(weight)} axes, not 2"
    if weight.dtype is None or weight.dtype.name not in ("FLOAT", "FLOAT16", "DOUBLE"):
        return f"the weight is {weight.dtype.name if weight.dtype else 'of unknown type'}, not one of {FLOAT_TYPES}"
    transposes = sum(wrapper.op_type == "Transpose" for wrapper in wrappers)
    if node.op_type == "Gemm":
        transposes += node.attributes.get_int("transB", 0)
        if node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
            return "a Gemm with transA or alpha is no linear module"
        if node.attributes.get_float("beta", 1.0) != 1.0:
            return "a Gemm with beta scales its bias, and is no linear module"
    transposed = bool(transposes % 2)
    assert weight.shape is not None
    rows, columns = (int(size) for size in weight.shape.numpy())
    if 0 in (rows, columns):
        return "the weight is empty"
    inputs, outputs = (columns, rows) if transposed else (rows, columns)
    module = _name(node, weight)
    # A weight that kept its torch name kept torch's layout: Conv1D where it needs no transposing.
    in_out = weight.name == f"{module}.weight" and not transposed
    return Linear(node, weight, wrappers, transposed, module, inputs, outputs, in_out=in_out)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else value.shape.rank()


def _label(node: ir.Node) -> str:
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


def _name(node: ir.Node, weight: ir.Value) -> str:
    """The module's name by what the exporter wrote: scopes, the node's path, the weight's name."""
    scopes = node.metadata_props.get(_NAME_SCOPES)
    if scopes is not None:
        try:
            around = [str(scope) for scope in ast.literal_eval(scopes)]
        except (ValueError, SyntaxError):
            around = []
        if len(around) > 1 and around[-2]:
            return around[-2]
    match = _NODE_NAME.fullmatch(node.name or "")
    path = match["path"].replace("/", ".") if match else None
    stem = weight.name.removesuffix(".weight") if weight.name and weight.name.endswith(".weight") else None
    # Of a tied weight the name is the other module's; of a part exported alone the path lacks its beginning.
    if path is None or (stem is not None and stem.endswith(f".{path}")):
        return stem or path or _label(node)
    return path


def _merge_calls(linears: list[Linear]) -> Iterator[Linear]:
    """Give later calls of a module (`query_1`) the module's own name, if the weight is the same."""
    weights = {linear.module: linear.weight for linear in linears}
    for linear in linears:
        again = _CALLED_AGAIN.fullmatch(linear.module)
        if again and weights.get(again["path"]) is linear.weight:
            yield replace(linear, module=again["path"])
        else:
            yield linear


def _embedded(graph: ir.Graph, checkpoint: Checkpoint) -> frozenset[str]:
    """Modules of the checkpoint that are embeddings: their weight is looked up by a Gather."""
    tables: dict[str, ir.Value] = {}
    for node in graph:
        if node.op_type == "Gather":
            table, _ = unwrap(node.inputs[0])
            if table is not None and _rank(table) == 2 and table.const_value is not None and table.name:
                tables[table.name] = table
    names: set[str] = set()
    for table in tables.values():
        assert table.const_value is not None
        values = table.const_value.numpy()
        if values.dtype.name in FLOAT_TYPES and 0 not in values.shape:
            names.update(match.module for way in checkpoint.find(values.T) for match in way)
    return frozenset(names)


def _identify(linear: Linear, checkpoint: Checkpoint, embedded: frozenset[str]) -> list[Linear] | str:
    """The checkpoint's modules that this node computes, or why that cannot be said."""
    weight = np.asarray(linear.values())
    ways = checkpoint.find(weight)
    own = [way for way in ways if not (len(way) == 1 and way[0].module in embedded)]
    if not own:
        if ways and linear.module not in {way[0].module for way in ways}:
            # A head tied to the embeddings: the checkpoint has its values under the other name.
            return [linear]
        if linear.module in checkpoint.modules:
            return f"its weight is not the checkpoint's {linear.module}.weight"
        return "no weight of the checkpoint equals its weight"
    if len(own) > 1:
        named = [way for way in own if len(way) == 1 and _agrees(linear.module, way[0].module)]
        if len(named) != 1:
            return f"its weight is that of several modules: {', '.join(sorted(way[0].module for way in own)[:8])}"
        own = named
    return [_placed(linear, match) for match in own[0]]


def _agrees(guess: str, module: str) -> bool:
    """Whether a name guessed from the graph can mean the module: one ends with the other."""
    again = _CALLED_AGAIN.fullmatch(guess)
    guesses = [guess] + ([again["path"]] if again else [])
    return any(name == module or module.endswith(f".{name}") or name.endswith(f".{module}") for name in guesses)


def _placed(linear: Linear, match: Match) -> Linear:
    return replace(linear, module=match.module, start=match.start, out_features=match.outputs, in_out=match.in_out)
