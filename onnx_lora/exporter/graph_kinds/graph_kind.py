"""What the exporter knows of a kind of module, in one object, and the registry of those objects. A new kind is a class
in `onnx_lora/kinds.py` and an object here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import onnx_ir as ir

from onnx_lora.kinds import Kind

if TYPE_CHECKING:
    from onnx_lora.exporter.graph.product import Product, Unfit
    from onnx_lora.exporter.surgery.branches import BranchBuilder

__all__ = [
    "Form",
    "GraphKind",
    "Operator",
    "find_kind",
    "graph_kind_of",
    "graph_kinds",
    "kind_of_call",
    "kind_of_fused",
    "product_of",
    "register",
]

# An operator: its domain ("" is ONNX's own) and its name.
Operator = tuple[str, str]

# Reads a node of one operator: the product that it is, why it is none though it has a weight, or None: it has none.
Form = Callable[[ir.Node], "Product | Unfit | None"]


def _refuse_nothing(module: Any, plain: type) -> str | None:
    del module, plain
    return None


@dataclass(frozen=True)
class GraphKind:
    """How graphs, PyTorch and exporters show modules of one kind.

    forms            the operators that compute it, and how a node of each is read
    builder          writes its branches
    torch_classes    the names of PyTorch's and transformers' classes that compute it
    calls            a regular expression: what torch.onnx (dynamo) calls the function behind it
    layouts          whether torch may keep its weight `[in, out]`: transformers' Conv1D does, nn.Linear does not
    is_linear        "all-linear" means it: it may be packed with others, cut up, tied to a table, and replaced by row
    looks_up         it reads rows of a table by their numbers: it has no inputs to scale and adds no bias, and a
                     node's form alone does not tell it from other lookups
    has_kernel       the axes of a window stand behind the first two of its weight
    takes_norms      exporters multiply a batch norm behind it into its weight, and give that another name
    refuse           why PEFT's delta beside a torch module's product would be another than PEFT's beside the module, or
                     None; given the module and the class of `torch_classes` that it is
    """

    kind: type[Kind]
    forms: Mapping[Operator, Form]
    builder: BranchBuilder
    torch_classes: tuple[str, ...] = ()
    calls: str = ""
    layouts: tuple[bool, ...] = (False,)
    is_linear: bool = False
    looks_up: bool = False
    has_kernel: bool = False
    takes_norms: bool = False
    refuse: Callable[[Any, type], str | None] = field(default=_refuse_nothing)

    @property
    def name(self) -> str:
        """As manifests write it."""
        return str(cast(Any, self.kind).name)


# Where the built-in ones stand; they are loaded when the first is asked for.
_BUILT_IN = (
    "onnx_lora.exporter.graph_kinds.linear:LINEAR_IN_GRAPHS",
    "onnx_lora.exporter.graph_kinds.embedding:EMBEDDING_IN_GRAPHS",
    "onnx_lora.exporter.graph_kinds.conv:CONV_IN_GRAPHS",
)

_registered: dict[type[Kind], GraphKind] = {}


def register(added: GraphKind) -> None:
    """Add a kind, or put it in the place of the one registered for the same class."""
    graph_kinds()
    _registered[added.kind] = added


def graph_kinds() -> tuple[GraphKind, ...]:
    """All kinds, the built-in ones first."""
    if not _registered:
        for place in _BUILT_IN:
            module, _, name = place.partition(":")
            built_in: GraphKind = getattr(import_module(module), name)
            _registered[built_in.kind] = built_in
    return tuple(_registered.values())


def find_kind(kind: type[Kind]) -> GraphKind:
    """What is registered for a kind."""
    graph_kinds()
    return _registered[kind]


def graph_kind_of(product: Product) -> GraphKind:
    """The kind of a product's module."""
    return find_kind(type(product.kind))


def product_of(node: ir.Node) -> Product | Unfit | None:
    """The product that `node` is, why it is none though it has a weight, or None: another operator.

    Of kinds that read the same operator, the one registered last looks first.
    """
    operator = node.domain.replace("ai.onnx", ""), node.op_type
    for graph_kind in reversed(graph_kinds()):
        form = graph_kind.forms.get(operator)
        if form is None:
            continue
        read = form(node)
        if read is not None:
            return read
    return None


def kind_of_call(function: str) -> GraphKind | None:
    """The kind that calls a function of torch's, by the name that torch.onnx (dynamo) gives it; None: another one."""
    for graph_kind in graph_kinds():
        if re.fullmatch(graph_kind.calls, function):
            return graph_kind
    return None


def kind_of_fused(op_type: str) -> GraphKind:
    """The kind of a node that a batch norm was multiplied into: a convolution of some sort, or a linear module."""
    by_operator: dict[str, GraphKind] = {}
    for graph_kind in graph_kinds():
        for _, name in graph_kind.forms if graph_kind.takes_norms else ():
            by_operator[name] = graph_kind
    begun = [name for name in by_operator if op_type.startswith(name)]
    if begun:
        return by_operator[max(begun, key=len)]
    return next(graph_kind for graph_kind in graph_kinds() if graph_kind.is_linear)
