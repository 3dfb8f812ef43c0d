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
from onnx_lora.points import FLOAT_TYPES, Array

__all__ = ["Linear", "Located", "Stray", "label_of", "locate", "same_weight", "unwrap"]

# torch.onnx (dynamo) writes the module path of every node here.
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"

# TorchScript's exporter, and the GenAI builder: `/model/layers.0/self_attn/q_proj/MatMul_1`.
_NODE_NAME = re.compile(r"/(?P<path>.+)/[A-Za-z]+(_\d+)?")

# A module called a second time gets its scope numbered: `query_1`.
_CALLED_AGAIN = re.compile(r"(?P<path>.+)_\d+")

_FLOATS = ("FLOAT", "FLOAT16", "DOUBLE")

# Operators between an initializer and the node that multiplies with it.
_WRAPPERS = ("Cast", "Identity", "Transpose")

# Operators whose weights an adapter may mean, and that get no point yet: Conv, FusedMatMul, MatMulNBits, LSTM, ...
_WEIGHTED = re.compile(r".*(Attention|BlockQuantized|Conv|GRU|Gemm|LSTM|MatMul|MoE|RNN).*")


@dataclass(frozen=True, slots=True)
class Linear:
    """A node that computes `x · W0` (and a bias, in a Gemm) for one module; `guess` is the name the graph gives it.

    `wrappers` lead from the node back to the initializer `weight`, nearest first. `transposed`:
    the initializer is stored `[out, in]`. `start`: the first output that is the module's own, in a
    packed projection. `in_out`: torch keeps the weight `[in, out]`.
    """

    node: ir.Node
    weight: ir.Value
    wrappers: tuple[ir.Node, ...]
    transposed: bool
    module: str
    guess: str
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
            return (self.node, 2) if len(self.node.inputs) > 2 and self._is_bias(self.node.inputs[2]) else None
        output = self.node.outputs[0]
        uses = list(output.uses())
        if len(uses) != 1 or output.is_graph_output():
            return None
        add = uses[0].node
        if add.op_type != "Add" or add.graph is not self.node.graph:
            return None
        position = 1 - uses[0].idx
        return (add, position) if self._is_bias(add.inputs[position]) else None

    def _is_bias(self, value: ir.Value | None) -> bool:
        """One number for each output of the node; anything else is added, and is no bias of a module."""
        initializer, _ = unwrap(value)
        if initializer is None or initializer.shape is None:
            return False
        return tuple(initializer.shape.numpy()) == (self.values().shape[1],)

    @property
    def adds_more(self) -> bool:
        """Whether a Gemm adds what is no bias: computed, or of another shape."""
        return self.node.op_type == "Gemm" and self.bias is None and len(self.node.inputs) > 2

    def values(self) -> Array:
        """The node's whole weight `[in, outputs]`, of which the module's is a window."""
        assert self.weight.const_value is not None
        stored = self.weight.const_value.numpy()
        return stored.T if self.transposed else stored

    def window(self) -> Array:
        """The module's own weight `[in, out]`."""
        return self.values()[:, self.start : self.start + self.out_features]

    @property
    def dtype(self) -> str:
        """The type the node computes in: behind a Cast another than the weight's."""
        return _computed(self.weight, self.wrappers)


@dataclass(frozen=True, slots=True)
class Stray:
    """A node with a weight that gets no point, why, and the modules it may belong to: they get none either."""

    node: str
    reason: str
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """What `locate` found in one graph, in its order: linear nodes by module, and nodes without a place."""

    linears: tuple[Linear, ...]
    strays: tuple[Stray, ...]


def locate(graph: ir.Graph, checkpoint: Checkpoint | None = None) -> Located:
    """Find the modules behind the nodes.

    With a checkpoint a node's weight must be one of the checkpoint's, value for value, and its name
    decides between equals. Without, the name alone does: dynamo's scopes, the node's path, the
    initializer's name.
    """
    found: list[Linear] = []
    strays: list[Stray] = []
    for node in ir.traversal.RecursiveGraphIterator(graph):
        linear = _candidate(node)
        if isinstance(linear, Stray):
            strays.append(linear)
        elif linear is not None and node.graph is not graph:
            reason = "it lies in a branch or loop body, where inputs cannot be optional"
            strays.append(Stray(label_of(node), reason, _possible(linear.guess, checkpoint)))
        elif linear is not None:
            found.append(linear)
    if checkpoint is None:
        return Located(tuple(_merge_calls(found)), tuple(strays))
    placed: list[Linear] = []
    embedded = _embedded(graph, checkpoint) if checkpoint.heads is None else frozenset[str]()
    for linear in found:
        result = _identify(linear, checkpoint, embedded)
        if isinstance(result, str):
            strays.append(Stray(label_of(linear.node), result, _possible(linear.guess, checkpoint)))
        else:
            placed.extend(result)
    kept, others = _without_tied(placed)
    return Located(tuple(kept), (*strays, *others))


def _possible(guess: str, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """The modules a node may be of, by its name: `query_1` may be a later call of `query`."""
    again = _CALLED_AGAIN.fullmatch(guess)
    guesses = [guess] if again is None else [guess, again["path"]]
    known = () if checkpoint is None else (module for module in checkpoint.modules if _agrees(guess, module))
    return tuple(dict.fromkeys([*guesses, *known]))


def _without_tied(linears: list[Linear]) -> tuple[list[Linear], list[Stray]]:
    """Of nodes with one module's weight under several names, only those with the module's own name are its."""
    guesses: dict[str, set[str]] = {}
    for linear in linears:
        guesses.setdefault(linear.module, set()).add(linear.guess)
    kept: list[Linear] = []
    strays: list[Stray] = []
    for linear in linears:
        several = len(guesses[linear.module]) > 1
        if not several or linear.out_features != linear.values().shape[1] or _agrees(linear.guess, linear.module):
            kept.append(linear)
        else:
            reason = f"its weight is that of {linear.module}, to which it may only be tied"
            strays.append(Stray(label_of(linear.node), reason, (linear.guess,)))
    return kept, strays


def unwrap(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """The initializer behind Transpose, Cast and Identity nodes, and those nodes; or None."""
    wrappers: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in _WRAPPERS:
        wrappers.append(node)
        value = node.inputs[0]
    constant = value is not None and value.is_initializer() and not value.is_graph_input()
    return (value if constant else None), tuple(wrappers)


def _candidate(node: ir.Node) -> Linear | Stray | None:
    """A linear node by its form alone (named by its best guess), one that has no place, or None."""
    plain = node.op_type in ("MatMul", "Gemm") and node.domain in ("", "ai.onnx") and len(node.inputs) > 1
    if not plain:
        weights = [value for value in node.inputs if _rank(unwrap(value)[0]) not in (None, 0, 1)]
        if weights and _WEIGHTED.fullmatch(node.op_type):
            guess = _name(node, unwrap(weights[0])[0])
            return Stray(label_of(node), f"{node.op_type} gets no point yet", _possible(guess, None))
        return None
    weight, wrappers = unwrap(node.inputs[1])
    maker = None if node.inputs[1] is None else node.inputs[1].producer()
    if weight is None and maker is not None and "Dequantize" in maker.op_type:
        quantised, _ = unwrap(maker.inputs[0])
        return Stray(
            label_of(node), "its weight is quantised, and gets no point yet", _possible(_name(node, quantised), None)
        )
    if weight is None:
        left, _ = unwrap(node.inputs[0])
        if _rank(left) != 2:
            return None
        return Stray(label_of(node), "the weight is the left factor", _possible(_name(node, left), None))
    guess = _name(node, weight)
    if (reason := _unfit(node, weight, wrappers)) is not None:
        return Stray(label_of(node), reason, _possible(guess, None))
    transposes = sum(_swaps(wrapper) for wrapper in wrappers) + node.attributes.get_int("transB", 0)
    transposed = bool(transposes % 2)
    assert weight.shape is not None
    rows, columns = (int(size) for size in weight.shape.numpy())
    inputs, outputs = (columns, rows) if transposed else (rows, columns)
    # A weight that kept its torch name kept torch's layout: Conv1D where it needs no transposing.
    in_out = weight.name == f"{guess}.weight" and not transposed and node.op_type == "Gemm"
    return Linear(node, weight, wrappers, transposed, guess, guess, inputs, outputs, in_out=in_out)


def _unfit(node: ir.Node, weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> str | None:
    """Why a product with a constant is no linear module, or None."""
    if _rank(weight) != 2 or weight.shape is None:
        return f"the weight has {_rank(weight)} axes, not 2"
    if 0 in weight.shape.numpy():
        return "the weight is empty"
    stored = "of unknown type" if weight.dtype is None else weight.dtype.name
    if stored not in _FLOATS:
        return f"the weight is {stored}, not one of {', '.join(FLOAT_TYPES)}"
    casts = [ir.DataType(wrapper.attributes.get_int("to")) for wrapper in wrappers if wrapper.op_type == "Cast"]
    if odd := [kind.name for kind in casts if kind.name not in _FLOATS]:
        return f"the weight is cast to {odd[0]}, not one of {', '.join(FLOAT_TYPES)}"
    if node.op_type != "Gemm":
        return None
    if node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return "a Gemm with transA or alpha is no linear module"
    return None if node.attributes.get_float("beta", 1.0) == 1.0 else "a Gemm with beta is no linear module"


def _swaps(wrapper: ir.Node) -> bool:
    """Whether it turns `[in, out]` into `[out, in]`. Without `perm` a Transpose reverses the axes."""
    return wrapper.op_type == "Transpose" and list(wrapper.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _computed(weight: ir.Value, wrappers: tuple[ir.Node, ...]) -> str:
    for wrapper in wrappers:
        if wrapper.op_type == "Cast":
            return ir.DataType(wrapper.attributes.get_int("to")).numpy().name
    return weight.dtype.numpy().name if weight.dtype is not None else "unknown"


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else value.shape.rank()


def label_of(node: ir.Node) -> str:
    """A node's name, or what stands for it."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


def _name(node: ir.Node, weight: ir.Value | None) -> str:
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
    name = (weight.name if weight is not None else None) or ""
    stem = name.removesuffix(".weight") if name.endswith(".weight") else None
    # Of a tied weight the name is the other module's; of a part exported alone the path lacks its beginning.
    if path is None or (stem is not None and stem.endswith(f".{path}")):
        return stem or path or label_of(node)
    return path


def _merge_calls(linears: list[Linear]) -> Iterator[Linear]:
    """Give later calls of a module (`query_1`) the module's own name, if the weight is the same."""
    first: dict[str, Linear] = {}
    for linear in linears:
        first.setdefault(linear.module, linear)
    for linear in linears:
        again = _CALLED_AGAIN.fullmatch(linear.module)
        original = first.get(again["path"]) if again else None
        if original is not None and same_weight(original, linear):
            yield replace(linear, module=original.module)
        else:
            yield linear


def same_weight(one: Linear, other: Linear) -> bool:
    """Whether two nodes multiply with the same values for their module."""
    if one.weight is other.weight and (one.transposed, one.start) == (other.transposed, other.start):
        return one.out_features == other.out_features
    return np.array_equal(one.window(), other.window())


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
    ways = checkpoint.find(np.asarray(linear.values()))
    own = [way for way in ways if not (len(way) == 1 and way[0].module in embedded)]
    if not own:
        if ways and linear.module not in {way[0].module for way in ways}:
            # A head tied to the embeddings: the checkpoint has its values under the other name.
            return [linear]
        if linear.module in checkpoint.modules:
            return f"its weight is not the checkpoint's {linear.module}.weight"
        return "no weight of the checkpoint equals its weight"
    if len(own) > 1:
        named = [way for way in own if _named(linear.guess, way)]
        if len(named) != 1:
            modules = sorted({match.module for way in own for match in way})
            return f"its weight is that of several modules: {', '.join(modules[:8])}"
        own = named
    return [_placed(linear, match) for match in own[0]]


def _named(guess: str, way: list[Match]) -> bool:
    """Whether a node's name speaks for one way of several: the module's name, or of a packed node its numbers."""
    if len(way) == 1:
        return _agrees(guess, way[0].module)
    return all(re.findall(r"\d+", match.module) == re.findall(r"\d+", guess) for match in way)


def _agrees(guess: str, module: str) -> bool:
    """Whether a name guessed from the graph can mean the module: one ends with the other."""
    again = _CALLED_AGAIN.fullmatch(guess)
    guesses = [guess] + ([again["path"]] if again else [])
    return any(name == module or module.endswith(f".{name}") or name.endswith(f".{module}") for name in guesses)


def _placed(linear: Linear, match: Match) -> Linear:
    return replace(linear, module=match.module, start=match.start, out_features=match.outputs, in_out=match.in_out)
