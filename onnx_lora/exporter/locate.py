"""Which nodes of a graph compute which module, and where their weights come from. It reads the graph and changes
nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.checkpoint import NEVER_CALLED, Checkpoint, Match, scaled_axis
from onnx_lora.exporter.located import Located, Occurrence, Stray, label_of, same_weight
from onnx_lora.exporter.products import Operand, Product, Unfit, axes_of, product_of, unwrap
from onnx_lora.exporter.scopes import path_of, scopes_around
from onnx_lora.exporter.traces import RULE_NAME
from onnx_lora.kinds import Conv, Embedding, Linear
from onnx_lora.points import FLOAT_TYPES, Array

__all__ = ["locate"]

# A weight that kept its torch name, or what a quantizer made of that.
_NAMED_WEIGHT = re.compile(r"(?P<module>.+)\.weight(_(Q|quant).*)?")

# A module called a second time gets its scope numbered: `query_1`.
_CALLED_AGAIN = re.compile(r"(?P<path>.+)_\d+")

# Operators whose weights an adapter may mean, and that get no point yet: FusedMatMul, LSTM, ... Of the
# attentions only those that hold projections: the others have caches and tables at most.
_WEIGHTED = re.compile(
    r"(Decoder|Longformer|Packed|Q)?Attention|.*(BlockQuantized|Conv|GRU|Gemm|LSTM|MatMul|MoE|RNN).*"
)


# How far rounding may have moved a quantized weight, relative to its norm, by bits. To 4 bits in blocks of 32 it
# moves a normal weight by 0.08, to 8 bits with one scale and a far outlier by 0.1; another module's is 1.4 away.
_ROUNDED = {2: 0.6, 4: 0.3, 8: 0.12}


def locate(graph: ir.Graph, checkpoint: Checkpoint | None = None) -> Located:
    """Find the modules behind the nodes.

    With a checkpoint a node's weight must be one of the checkpoint's (value for value; of a quantized
    one the nearest), and its name decides between equals. Without, the name alone does: dynamo's
    scopes, the node's path, the initializer's name.
    """
    located = _located(graph, checkpoint)
    never_called = {
        name.removesuffix("in_proj_bias").removesuffix("in_proj_weight") + "out_proj"
        for name in graph.initializers
        if name.endswith((".in_proj_bias", ".in_proj_weight"))
    }
    return located.without(dict.fromkeys(never_called, NEVER_CALLED), other_weight=False)


def _located(graph: ir.Graph, checkpoint: Checkpoint | None) -> Located:
    found: list[Occurrence] = []
    strays: list[Stray] = []
    for node in ir.traversal.RecursiveGraphIterator(graph):
        linear = _candidate(node, named=checkpoint is None)
        if isinstance(linear, Stray):
            strays.append(linear)
        elif linear is not None and node.graph is not graph:
            reason = "it lies in a branch or loop body, where inputs cannot be optional"
            strays.append(Stray(label_of(node), reason, _possible(linear.guess, checkpoint)))
        elif linear is not None:
            found.append(linear)
    if checkpoint is None:
        return Located(tuple(_merge_calls(found)), tuple(strays))
    placed: list[Occurrence] = []
    embedded = _embedded(graph, checkpoint) if checkpoint.heads is None else frozenset[str]()
    for linear in found:
        result = _identify(linear, checkpoint, embedded)
        if result is None:
            continue
        if isinstance(result, str):
            strays.append(Stray(label_of(linear.node), result, _possible(linear.guess, checkpoint), other_weight=True))
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


def _without_tied(linears: list[Occurrence]) -> tuple[list[Occurrence], list[Stray]]:
    """Of nodes with one module's weight under several names, only those with the module's own name are its."""
    guesses: dict[tuple[str, int], set[str]] = {}
    for linear in linears:
        guesses.setdefault((linear.module, linear.first), set()).add(linear.guess)
    kept: list[Occurrence] = []
    strays: list[Stray] = []
    for linear in linears:
        several = len(guesses[linear.module, linear.first]) > 1
        if not several or not linear.is_whole or _agrees(linear.guess, linear.module):
            kept.append(linear)
        else:
            reason = f"its weight is that of {linear.module}, to which it may only be tied"
            strays.append(Stray(label_of(linear.node), reason, (linear.guess,)))
    return kept, strays


_FUSED = "a batch norm is multiplied into its weight, or may be: give the checkpoint, and export without fusing them"


def _candidate(node: ir.Node, *, named: bool) -> Occurrence | Stray | None:
    """A product by its form alone (named by its best guess), one that has no place, or None.

    `named`: there is no checkpoint, and the name alone tells. A table that is looked up may be anything, and is an
    embedding's only if it is called a weight; a kernel that lost that name may have a batch norm multiplied in, which
    an adapter's change would miss.
    """
    product = product_of(node)
    if isinstance(product, Product):
        weight = product.weight.value
        embedding = isinstance(product.kind, Embedding)
        guess, nameless = _name(node, weight), named and not _NAMED_WEIGHT.fullmatch(weight.name or "")
        if embedding and nameless:
            return None
        fused = isinstance(product.kind, Conv) and named and not _keeps_name(weight, guess)
        if fused or "FuseBatchNorm" in node.metadata_props.get(RULE_NAME, ""):
            # The node may be called after the norm, and the weight after the module.
            modules = dict.fromkeys([*_possible(guess, None), _NAMED_WEIGHT.sub(r"\g<module>", weight.name or "")])
            return Stray(label_of(node), _FUSED, tuple(modules), other_weight=True)
        if (owner := _used_by_root(node, weight)) is not None:
            return Stray(label_of(node), "its weight is used by a function, not by the module itself", (owner,))
        # A weight that kept its torch name kept torch's layout: Conv1D where it needs no transposing.
        plain = node.op_type == "Gemm" and not product.transposed
        in_out = embedding or (plain and weight.name == f"{guess}.weight")
        return Occurrence(product, guess, guess, product.outputs, product.outputs, in_out=in_out)
    if isinstance(product, Unfit):
        return Stray(label_of(node), product.reason, _possible(_name(node, product.weight), None))
    weights = [value for value in node.inputs if axes_of(unwrap(value)[0]) not in (None, 0, 1)]
    if node.op_type in ("MatMul", "Gemm") or not weights or not _WEIGHTED.fullmatch(node.op_type):
        return None
    guess = _name(node, unwrap(weights[0])[0])
    return Stray(label_of(node), f"{node.op_type} gets no point yet", _possible(guess, None))


def _keeps_name(weight: ir.Value, guess: str) -> bool:
    """Whether a kernel has its module's name: what is multiplied into it gives it another (`ConvMulFusion_W_...`)."""
    named = _NAMED_WEIGHT.fullmatch(weight.name or "")
    return named is not None and _agrees(guess, named["module"])


def _used_by_root(node: ir.Node, weight: ir.Value) -> str | None:
    """The module whose weight the model itself computes with, outside of every module (dynamo's scopes say so)."""
    around, named = scopes_around(node), _NAMED_WEIGHT.fullmatch(weight.name or "")
    return named["module"] if len(around) > 1 and not around[-2] and named is not None else None


def _name(node: ir.Node, weight: ir.Value | None) -> str:
    """The module's name by what the exporter wrote: scopes, the node's path, the weight's name."""
    around = scopes_around(node)
    if len(around) > 1 and around[-2]:
        return around[-2]
    path = path_of(node)
    name = (weight.name if weight is not None else None) or ""
    stem = name.removesuffix(".weight") if name.endswith(".weight") else None
    # Of a tied weight the name is the other module's; of a part exported alone the path lacks its beginning.
    if path is None or (stem is not None and stem.endswith(f".{path}")):
        return stem or path or label_of(node)
    return path


def _merge_calls(linears: list[Occurrence]) -> Iterator[Occurrence]:
    """Give later calls of a module (`query_1`) the module's own name, if the weight is the same."""
    first: dict[str, Occurrence] = {}
    for linear in linears:
        first.setdefault(linear.module, linear)
    for linear in linears:
        again = _CALLED_AGAIN.fullmatch(linear.module)
        original = first.get(again["path"]) if again else None
        if original is not None and same_weight(original, linear):
            yield replace(linear, module=original.module)
        else:
            yield linear


def _distance(product: Product) -> float:
    """How far a weight may be from the checkpoint's."""
    return 0.0 if product.quantized is None else _ROUNDED[product.quantized.scheme.bits]


def _embedded(graph: ir.Graph, checkpoint: Checkpoint) -> frozenset[str]:
    """Modules of the checkpoint that are embeddings: their weight is looked up by a Gather, or is the one a
    quantized Gather shares with a product."""
    tables: dict[str, ir.Value] = {}
    names: set[str] = set()
    for node in graph:
        if node.op_type == "Gather":
            table, _ = unwrap(node.inputs[0])
            if table is not None and axes_of(table) == 2 and table.const_value is not None and table.name:
                tables[table.name] = table
        product = product_of(node)
        if not isinstance(product, Product) or not isinstance(product.kind, Linear):
            continue
        if product.quantized is not None and _is_looked_up(product.weight):
            names.update(
                match.module for way in checkpoint.find(product.values(), within=_distance(product)) for match in way
            )
    for table in tables.values():
        assert table.const_value is not None
        values = table.const_value.numpy()
        if values.dtype.name in FLOAT_TYPES and 0 not in values.shape:
            names.update(match.module for way in checkpoint.find(values.T) for match in way)
    return frozenset(names)


def _is_looked_up(weight: Operand) -> bool:
    """Whether a quantized Gather reads a weight, as it is or reshaped."""
    users = [use.node for use in weight.value.uses()]
    users += [use.node for node in users if node.op_type == "Reshape" for use in node.outputs[0].uses()]
    return any(node.op_type == "GatherBlockQuantized" for node in users)


def _identify(linear: Occurrence, checkpoint: Checkpoint, embedded: frozenset[str]) -> list[Occurrence] | str | None:
    """The checkpoint's modules that this node computes, why that cannot be said, or None: a table of no module."""
    kind = type(linear.product.kind)
    weight, within = np.asarray(linear.product.values()), _distance(linear.product)
    ways = checkpoint.find(weight, kind, within=within)
    if not ways and kind is Linear:
        ways = checkpoint.find_piece(weight, linear.guess, within=within)
    own = [way for way in ways if kind is not Linear or not (len(way) == 1 and way[0].module in embedded)]
    if not own and kind is Embedding and linear.module not in checkpoint.modules:
        return None
    if not own:
        if ways and linear.module not in {way[0].module for way in ways}:
            # A head tied to the embeddings: the checkpoint has its values under the other name.
            tied = [replace(linear, reference=ways[0][0].read)]
            return tied if linear.product.quantized is None else _compared(tied, weight, ways[0])
        if linear.guess in checkpoint.refused:
            return checkpoint.refused[linear.guess]
        if linear.module in checkpoint.modules:
            return f"its weight is not the checkpoint's {linear.module}.weight{_difference(linear, checkpoint)}"
        return "no weight of the checkpoint equals its weight"
    twins: list[str] = []
    if len(own) > 1:
        named = [way for way in own if _named(linear.guess, way)]
        if len(named) != 1:
            modules = sorted({match.module for way in own for match in way})
            return f"its weight is that of several modules: {', '.join(modules)}"
        twins = [match.module for way in own if way is not named[0] for match in way]
        own = named
    placed = [replace(_placed(linear, match), twins=tuple(twins)) for match in own[0]]
    return placed if linear.product.quantized is None else _compared(placed, weight, own[0])


def _compared(placed: list[Occurrence], weight: Array, way: list[Match]) -> list[Occurrence] | str:
    """A quantized product's modules, where its weight is what its quantizer made of theirs; unproven where that
    cannot be told, and why not where it is another: the tolerance of rounding hides scales of some percent."""
    product = placed[0].product
    reference = np.concatenate([_by_input(match) for match in way], axis=1)
    if product.is_rounded(reference):
        return placed
    if (scaled := scaled_axis(weight, reference)) is not None:
        return f"its quantized weight is the checkpoint's with its {scaled} scaled ({_CAUSES[scaled]})"
    doubt = "its quantized weight is not the checkpoint's rounded to nearest (GPTQ and others round otherwise)"
    return [replace(linear, unproven=doubt) for linear in placed]


# What scales a weight's inputs or outputs after training.
_CAUSES = {
    "inputs": "SmoothQuant, AWQ: the activation it reads is divided by that, which a branch beside it would miss",
    "outputs": "a scale or a norm behind it was multiplied in, which a branch beside it would miss",
}


def _by_input(match: Match) -> Array:
    """A match's outputs of its module's weight, `[in, outputs]`."""
    values = match.read().astype(np.float32, copy=False)
    matrix = values if match.in_out else values.T
    return matrix[:, match.first : match.first + match.outputs]


def _difference(linear: Occurrence, checkpoint: Checkpoint) -> str:
    """What explains that a weight is not its module's, or nothing."""
    weight = np.asarray(linear.product.values())
    for reference in checkpoint.matrices(linear.module):
        if reference.shape == weight.shape and (scaled := scaled_axis(weight, reference)) is not None:
            return f", but that with its {scaled} scaled ({_CAUSES[scaled]})"
    return ""


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


def _placed(linear: Occurrence, match: Match) -> Occurrence:
    return replace(
        linear,
        module=match.module,
        outputs=match.outputs,
        start=match.start,
        first=match.first,
        size=match.size,
        in_out=match.in_out,
        reference=match.read,
        known_bias=match.bias,
    )
