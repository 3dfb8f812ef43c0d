"""Nodes that may be modules, by their form and by the names that exporters give them; before any weight is compared."""

from __future__ import annotations

import re

import onnx_ir as ir

from onnx_lora.exporter.graph.product import Product, Unfit
from onnx_lora.exporter.graph.scopes import has_fused_norm, path_of, scopes_around
from onnx_lora.exporter.graph.values import axes_of, initializer_behind
from onnx_lora.exporter.graph_kinds.graph_kind import graph_kind_of, product_of
from onnx_lora.exporter.locating.located import Occurrence, UnplacedNode, label_of

__all__ = ["agrees", "as_first_call", "find_candidate", "name_possible_modules"]

# A weight that kept its torch name, or what a quantizer made of that.
_NAMED_WEIGHT = re.compile(r"(?P<module>.+)\.weight(_(Q|quant).*)?")

# A module called a second time gets its scope numbered: `query_1`.
_CALLED_AGAIN = re.compile(r"(?P<path>.+)_\d+")

# Operators whose weights an adapter may mean, and that get no point yet: FusedMatMul, LSTM, ... Of the
# attentions only those that hold projections: the others have caches and tables at most.
_WEIGHTED = re.compile(
    r"(Decoder|Longformer|Packed|Q)?Attention|.*(BlockQuantized|Conv|GRU|Gemm|LSTM|MatMul|MoE|RNN).*"
)

_FUSED = (
    "fused batch norm: a batch norm is multiplied into its weight, or may be; export the checkpoint with "
    "`onnx-lora export`, which keeps them apart"
)


def find_candidate(node: ir.Node, *, named: bool) -> Occurrence | UnplacedNode | None:
    """A product by its form alone (named by its best guess), one that has no place, or None.

    `named`: there is no checkpoint, and the name alone tells. A table that is looked up may be anything, and is an
    embedding's only if it is called a weight; a kernel that lost that name may have a batch norm multiplied in, which
    an adapter's change would miss.
    """
    read = product_of(node)
    if isinstance(read, Product):
        return _judge_product(read, named=named)
    if isinstance(read, Unfit):
        modules = name_possible_modules(_guess_name(node, read.weight))
        return UnplacedNode(label_of(node), read.reason, modules)
    weight = _find_unread_weight(node)
    if weight is None:
        return None
    modules = name_possible_modules(_guess_name(node, weight))
    return UnplacedNode(label_of(node), f"{node.op_type} gets no point yet", modules)


def _judge_product(product: Product, *, named: bool) -> Occurrence | UnplacedNode | None:
    node, weight, kind = product.node, product.weight.value, graph_kind_of(product)
    guess = _guess_name(node, weight)
    module = _module_of_weight(weight)
    if named and kind.looks_up and module is None:
        return None
    # What is multiplied into a kernel gives it another name (`ConvMulFusion_W_...`).
    lost_name = module is None or not agrees(guess, module)
    if (named and kind.takes_norms and lost_name) or has_fused_norm(node):
        # The node may be called after the norm, and the weight after the module.
        after_weight = _NAMED_WEIGHT.sub(r"\g<module>", weight.name or "")
        modules = dict.fromkeys([*name_possible_modules(guess), after_weight])
        return UnplacedNode(label_of(node), _FUSED, tuple(modules), other_weight=True)
    if module is not None and _is_in_root(node):
        return UnplacedNode(label_of(node), "its weight is used by a function, not by the module itself", (module,))
    # A weight that kept its torch name kept torch's layout: Conv1D where it needs no transposing.
    kept_layout = node.op_type == "Gemm" and not product.transposed and weight.name == f"{guess}.weight"
    return Occurrence(
        product=product,
        module=guess,
        guess=guess,
        outputs=product.outputs,
        size=product.outputs,
        in_out=kind.looks_up or kept_layout,
    )


def _find_unread_weight(node: ir.Node) -> ir.Value | None:
    """The first weight of a node of an operator that gets no point yet; None where it has none."""
    if node.op_type in ("MatMul", "Gemm") or not _WEIGHTED.fullmatch(node.op_type):
        return None
    for value in node.inputs:
        initializer = initializer_behind(value)
        if axes_of(initializer) not in (None, 0, 1):
            return initializer
    return None


def _module_of_weight(weight: ir.Value) -> str | None:
    """The module that a weight's own name says, or None: it has another sort of name."""
    match = _NAMED_WEIGHT.fullmatch(weight.name or "")
    return None if match is None else match["module"]


def _is_in_root(node: ir.Node) -> bool:
    """Whether the model itself computes a node, outside of every module; dynamo's scopes say so."""
    around = scopes_around(node)
    return len(around) > 1 and not around[-2]


def _guess_name(node: ir.Node, weight: ir.Value | None) -> str:
    """The module's name by what the exporter wrote: scopes, the node's path, the weight's name."""
    around = scopes_around(node)
    if len(around) > 1 and around[-2]:
        return around[-2]
    path = path_of(node)
    name = (weight.name if weight is not None else None) or ""
    stem = name.removesuffix(".weight") if name.endswith(".weight") else None
    if path is None:
        return stem or label_of(node)
    # Of a tied weight the name is the other module's; of a part exported alone the path lacks its beginning.
    if stem is not None and stem.endswith(f".{path}"):
        return stem
    return path


def name_possible_modules(guess: str) -> tuple[str, ...]:
    """The modules a node may be of, by its name: `query_1` may be a later call of `query`."""
    first = as_first_call(guess)
    return (guess,) if first is None else (guess, first)


def as_first_call(module: str) -> str | None:
    """The name of a module whose later call a name may mean (`query` of `query_1`), or None."""
    match = _CALLED_AGAIN.fullmatch(module)
    return None if match is None else match["path"]


def agrees(guess: str, module: str) -> bool:
    """Whether a name guessed from the graph can mean the module: one ends with the other."""
    for name in name_possible_modules(guess):
        if name == module or module.endswith(f".{name}") or name.endswith(f".{module}"):
            return True
    return False
