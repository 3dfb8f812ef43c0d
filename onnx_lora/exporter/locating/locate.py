"""Which nodes of a graph compute which module, and where their weights come from. It reads the graph and changes
nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.graph.product import Operand, Product
from onnx_lora.exporter.graph.values import axes_of, initializer_behind
from onnx_lora.exporter.graph_kinds.graph_kind import graph_kind_of, product_of
from onnx_lora.exporter.locating.candidates import agrees, as_first_call, find_candidate, name_possible_modules
from onnx_lora.exporter.locating.located import Located, Occurrence, UnplacedNode, have_same_weight, label_of
from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeights, Match, numbers_in
from onnx_lora.exporter.weights.never_called import NEVER_CALLED, find_never_called
from onnx_lora.exporter.weights.scaling import Axis, find_scaled_axis
from onnx_lora.points import FLOAT_TYPES, Array

__all__ = ["locate"]

# How far rounding may have moved a quantized weight, relative to its norm, by bits. To 4 bits in blocks of 32 it
# moves a normal weight by 0.08, to 8 bits with one scale and a far outlier by 0.1; another module's is 1.4 away.
_ROUNDED = {2: 0.6, 4: 0.3, 8: 0.12}

# What scales a weight's inputs or outputs after training.
_CAUSES = {
    "inputs": "SmoothQuant, AWQ: the activation it reads is divided by that, which a branch beside it would miss",
    "outputs": "a scale or a norm behind it was multiplied in, which a branch beside it would miss",
}

# Numbers of an output's that say whether they are another's, scaled: of one or two anything is.
_TELLING = 4

# A convolution's inputs nobody scales; where a norm scales all outputs alike, both axes explain it.
_FUSED = (
    "fused batch norm: a norm or a scale behind it was multiplied in, which a branch beside it would miss; export the "
    "checkpoint with `onnx-lora export`, which keeps them apart"
)


def locate(graph: ir.Graph, checkpoint: CheckpointWeights | None = None) -> Located:
    """Find the modules behind the nodes.

    With a checkpoint, a node's weight must equal one of the checkpoint's, value for value (a quantized weight must be
    near it), and the node's name decides between equal ones. Without a checkpoint the name decides alone: dynamo's
    scopes, else the node's path, else the initializer's name.
    """
    found, unplaced = _find_candidates(graph, checkpoint)
    if checkpoint is None:
        located = Located(tuple(_merge_calls(found)), tuple(unplaced))
    else:
        placed, unknown = _identify_all(graph, found, checkpoint)
        kept, tied = _drop_tied(placed)
        located = Located(tuple(kept), (*unplaced, *unknown, *tied))
    never_called = dict.fromkeys(find_never_called(graph.initializers), NEVER_CALLED)
    return located.without(never_called, other_weight=False)


def _find_candidates(
    graph: ir.Graph, checkpoint: CheckpointWeights | None
) -> tuple[list[Occurrence], list[UnplacedNode]]:
    """The products of a graph by their forms, and nodes that can have no point whatever their weight is."""
    found: list[Occurrence] = []
    unplaced: list[UnplacedNode] = []
    for node in ir.traversal.RecursiveGraphIterator(graph):
        candidate = find_candidate(node, named=checkpoint is None)
        if candidate is None:
            continue
        if isinstance(candidate, UnplacedNode):
            unplaced.append(candidate)
        elif node.graph is not graph:
            reason = "it lies in a branch or loop body, where inputs cannot be optional"
            unplaced.append(UnplacedNode(label_of(node), reason, _name_modules(candidate.guess, checkpoint)))
        else:
            found.append(candidate)
    return found, unplaced


def _name_modules(guess: str, checkpoint: CheckpointWeights | None) -> tuple[str, ...]:
    """The modules a node may be of, by its name, those of the checkpoint among them."""
    modules = dict.fromkeys(name_possible_modules(guess))
    if checkpoint is not None:
        modules.update((module, None) for module in checkpoint.modules if agrees(guess, module))
    return tuple(modules)


def _merge_calls(occurrences: Sequence[Occurrence]) -> list[Occurrence]:
    """Give later calls of a module (`query_1`) the module's own name, if the weight is the same."""
    first: dict[str, Occurrence] = {}
    for one in occurrences:
        first.setdefault(one.module, one)
    merged: list[Occurrence] = []
    for one in occurrences:
        name = as_first_call(one.module)
        original = None if name is None else first.get(name)
        if original is None or not have_same_weight(original, one):
            merged.append(one)
        else:
            merged.append(replace(one, module=original.module))
    return merged


def _drop_tied(occurrences: Sequence[Occurrence]) -> tuple[list[Occurrence], list[UnplacedNode]]:
    """Of nodes with one module's weight under several names, only those with the module's own name are its."""
    guesses: dict[tuple[str, int], set[str]] = {}
    for one in occurrences:
        guesses.setdefault((one.module, one.first), set()).add(one.guess)
    kept: list[Occurrence] = []
    unplaced: list[UnplacedNode] = []
    for one in occurrences:
        has_one_name = len(guesses[one.module, one.first]) == 1
        if has_one_name or not one.is_whole or agrees(one.guess, one.module):
            kept.append(one)
        else:
            reason = f"its weight is that of {one.module}, to which it may only be tied"
            unplaced.append(UnplacedNode(label_of(one.node), reason, (one.guess,)))
    return kept, unplaced


# --- by the weights of a checkpoint ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unknown:
    """Why it cannot be said which of the checkpoint's modules a node computes, and modules that it may be, which its
    name does not tell."""

    reason: str
    modules: tuple[str, ...] = ()


def _identify_all(
    graph: ir.Graph, candidates: Sequence[Occurrence], checkpoint: CheckpointWeights
) -> tuple[list[Occurrence], list[UnplacedNode]]:
    """The checkpoint's modules behind candidates, and the candidates that are of none for certain."""
    embedded = _find_embedded(graph, checkpoint) if checkpoint.heads is None else frozenset[str]()
    placed: list[Occurrence] = []
    unknown: list[UnplacedNode] = []
    for one in candidates:
        result = _identify(one, checkpoint, embedded)
        if isinstance(result, _Unknown):
            modules = dict.fromkeys((*_name_modules(one.guess, checkpoint), *result.modules))
            unknown.append(UnplacedNode(label_of(one.node), result.reason, tuple(modules), other_weight=True))
        else:
            placed.extend(result)
    return placed, unknown


def _find_embedded(graph: ir.Graph, checkpoint: CheckpointWeights) -> frozenset[str]:
    """Modules of the checkpoint that are embeddings: their weight is looked up by a Gather, or is the one a
    quantized Gather shares with a product."""
    names: set[str] = set()
    tables: dict[str, ir.TensorProtocol] = {}
    for node in graph:
        if node.op_type == "Gather":
            table = initializer_behind(node.inputs[0])
            if table is not None and table.name and axes_of(table) == 2 and table.const_value is not None:
                tables[table.name] = table.const_value
        product = product_of(node)
        if not isinstance(product, Product) or product.quantized is None or not graph_kind_of(product).is_linear:
            continue
        if _is_looked_up(product.weight):
            names |= _find_modules(checkpoint, product.values(), within=_distance(product))
    for tensor in tables.values():
        values = tensor.numpy()
        if values.dtype.name in FLOAT_TYPES and 0 not in values.shape:
            names |= _find_modules(checkpoint, values.T, within=0.0)
    return frozenset(names)


def _find_modules(checkpoint: CheckpointWeights, weight: Array, *, within: float) -> set[str]:
    """The modules of every way to read a weight `[in, out]`."""
    modules: set[str] = set()
    for way in checkpoint.find(weight, within=within):
        modules.update(match.module for match in way)
    return modules


def _is_looked_up(weight: Operand) -> bool:
    """Whether a quantized Gather reads a weight, as it is or reshaped."""
    users = [use.node for use in weight.value.uses()]
    for node in list(users):
        if node.op_type == "Reshape":
            users.extend(use.node for use in node.outputs[0].uses())
    return any(node.op_type == "GatherBlockQuantized" for node in users)


def _distance(product: Product) -> float:
    """How far a weight may be from the checkpoint's."""
    return 0.0 if product.quantized is None else _ROUNDED[product.quantized.scheme.bits]


def _identify(
    one: Occurrence, checkpoint: CheckpointWeights, embedded: Collection[str]
) -> Sequence[Occurrence] | _Unknown:
    """The checkpoint's modules that a node computes (none: it reads a table of no module), or why that is unknown."""
    kind = type(one.product.kind)
    is_linear, looks_up = one.graph_kind.is_linear, one.graph_kind.looks_up
    weight, within = np.asarray(one.product.values()), _distance(one.product)
    ways = checkpoint.find(weight, kind, within=within)
    if not ways and is_linear:
        ways = checkpoint.find_piece(weight, one.guess, within=within)
    own = ways
    if is_linear:
        own = [way for way in ways if len(way) > 1 or way[0].module not in embedded]
    if own:
        return _choose_way(one, weight, own)
    if looks_up and one.module not in checkpoint.modules:
        return ()
    if ways and one.module not in {way[0].module for way in ways}:
        # A head tied to the embeddings: the checkpoint has its values under the other name.
        tied = [replace(one, reference=ways[0][0].read)]
        return _compare_rounded(tied, weight, ways[0])
    return _explain_unknown(one, weight, checkpoint)


def _choose_way(one: Occurrence, weight: Array, ways: list[list[Match]]) -> Sequence[Occurrence] | _Unknown:
    """The modules of the one way to read a node's weight, or of the one of several that its name speaks for."""
    chosen = ways[0]
    twins: list[str] = []
    if len(ways) > 1:
        named = [way for way in ways if _is_named(one.guess, way)]
        if len(named) != 1:
            modules = set[str]()
            for way in ways:
                modules.update(match.module for match in way)
            return _Unknown(f"its weight is that of several modules: {', '.join(sorted(modules))}")
        chosen = named[0]
        for way in ways:
            if way is not chosen:
                twins.extend(match.module for match in way)
    placed = [_place(one, match, tuple(twins)) for match in chosen]
    return _compare_rounded(placed, weight, chosen)


def _is_named(guess: str, way: Sequence[Match]) -> bool:
    """Whether a node's name speaks for one way of several: the module's name, or of a packed node its numbers."""
    if len(way) == 1:
        return agrees(guess, way[0].module)
    return all(numbers_in(match.module) == numbers_in(guess) for match in way)


def _place(one: Occurrence, match: Match, twins: tuple[str, ...]) -> Occurrence:
    return replace(
        one,
        module=match.module,
        outputs=match.outputs,
        start=match.start,
        first=match.first,
        size=match.size,
        in_out=match.in_out,
        reference=match.read,
        known_bias=match.bias,
        twins=twins,
    )


def _compare_rounded(placed: list[Occurrence], weight: Array, way: Sequence[Match]) -> list[Occurrence] | _Unknown:
    """Compare a quantized product's weight once more with its modules' weights, rounded to nearest: the tolerance of
    `find` would hide scales of some percent. Gives the modules, unproven where the weight was rounded in another way;
    or why they are unknown, where scales explain the difference. Products of floats pass as they are."""
    product = placed[0].product
    if product.quantized is None:
        return placed
    reference = np.concatenate([_read_by_input(match) for match in way], axis=1)
    if product.is_rounded(reference):
        return placed
    scaled = find_scaled_axis(weight, reference)
    if scaled is not None:
        return _Unknown(f"its quantized weight is the checkpoint's with its {scaled} scaled ({_CAUSES[scaled]})")
    doubt = "its quantized weight is not the checkpoint's rounded to nearest (GPTQ and others round otherwise)"
    return [replace(one, unproven=doubt) for one in placed]


def _read_by_input(match: Match) -> Array:
    """A match's outputs of its module's weight, `[in, outputs]`."""
    values = match.read().astype(np.float32, copy=False)
    matrix = values if match.in_out else values.T
    return matrix[:, match.first : match.first + match.outputs]


def _explain_unknown(one: Occurrence, weight: Array, checkpoint: CheckpointWeights) -> _Unknown:
    """Why a weight is no module's of the checkpoint."""
    if one.guess in checkpoint.refused:
        return _Unknown(checkpoint.refused[one.guess])
    if one.graph_kind.takes_norms:
        return _explain_kernel(one, weight, checkpoint)
    if one.module not in checkpoint.modules:
        return _Unknown("no weight of the checkpoint equals its weight")
    scaled = _find_scaled(weight, one.module, checkpoint)
    difference = "" if scaled is None else f", but that with its {scaled} scaled ({_CAUSES[scaled]})"
    return _Unknown(f"its weight is not the checkpoint's {one.module}.weight{difference}")


def _explain_kernel(one: Occurrence, weight: Array, checkpoint: CheckpointWeights) -> _Unknown:
    """The same of a convolution. What was multiplied into its kernel may have cost it its name, so every kernel of the
    checkpoint is tried."""
    fused: list[str] = []
    if len(weight) >= _TELLING:
        for module in checkpoint.modules_like(weight, type(one.product.kind)):
            if _find_scaled(weight, module, checkpoint) is not None:
                fused.append(module)
    if fused:
        return _Unknown(_FUSED, tuple(fused))
    if one.module not in checkpoint.modules:
        return _Unknown("no weight of the checkpoint equals its weight")
    return _Unknown(f"its weight is not the checkpoint's {one.module}.weight")


def _find_scaled(weight: Array, module: str, checkpoint: CheckpointWeights) -> Axis | None:
    """The axis along which a weight is the checkpoint's of a module, but scaled; None: it is not."""
    for reference in checkpoint.matrices(module):
        scaled = find_scaled_axis(weight, reference) if reference.shape == weight.shape else None
        if scaled is not None:
            return scaled
    return None
