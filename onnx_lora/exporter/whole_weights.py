"""Which whole weights an adapter may replace: the parameters behind the names a user gives, and how
each lies in the graph. It reads the graph and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.exporter.located import Occurrence, label_of
from onnx_lora.exporter.options import HEADS_ONLY
from onnx_lora.exporter.products import unwrap
from onnx_lora.exporter.sites import Site, Sites
from onnx_lora.heads import CLASSIFIERS
from onnx_lora.kinds import Linear
from onnx_lora.points import FLOAT_TYPES, matches

__all__ = ["Exposure", "Exposures", "agreeing", "check_names", "find_exposures", "outputs_behind"]

# Operators that end a head: what comes behind them has a size of its own.
_WEIGHING = frozenset(["Conv", "Gemm", "LayerNormalization", "MatMul"])


@dataclass(frozen=True, slots=True)
class Exposure:
    """A parameter to be made an input: of the one node of a linear module, or an initializer as it is.

    `value` is the initializer, or the Identity that stands for it under the parameter's name; `user` the node
    that computes with it, where it is no linear module's.
    """

    name: str
    value: ir.Value
    site: Site | None = None
    is_bias: bool = False
    user: ir.Node | None = None

    @property
    def linear(self) -> Occurrence | None:
        return None if self.site is None else self.site.linears[0]


@dataclass(frozen=True, slots=True)
class Exposures:
    """What one graph can expose of what was asked for; `refused` says of the rest why not."""

    found: tuple[Exposure, ...]
    refused: dict[str, str]


def find_exposures(graph: ir.Graph, sites: Sites, replaceable: str | Sequence[str], *, prefix: str = "") -> Exposures:
    """The parameters that `replaceable` names (modules, or parameters, or suffixes of either); `prefix` is put before
    the names that the graph has.

    A linear module's weight takes its bias along. A bias asked for by itself keeps its place, and has no rows.
    """
    names = _names(replaceable)
    found: dict[str, Exposure] = {}
    refused: dict[str, str] = {}
    uses: dict[str, list[Site]] = {}
    for site in sites.sites:
        for module in site.modules if isinstance(site.products[0].kind, Linear) else ():
            uses.setdefault(module, []).append(site)
    for module, used in uses.items():
        exposures = _of_linear(used[0], module)
        if not _asked(exposures[0].name, names):
            continue
        if (reason := _not_whole(used, module)) is not None:
            refused[module] = reason
        else:
            found.update((exposure.name, exposure) for exposure in exposures)
    linear = [product for site in sites.sites for product in site.products if isinstance(product.kind, Linear)]
    places = {(operand.node, operand.position) for product in linear for operand in product.operands}
    places |= {(product.node, product.factor) for product in linear}
    taken = {exposure.value for exposure in found.values()}
    others = {stray.node: stray.reason for stray in sites.strays if stray.other_weight}
    for own_name, value in _named_initializers(graph).items():
        name = prefix + own_name
        users = _own_users(value, places)  # none: a linear module's weight
        if name in found or value in taken or not users or not _asked(name, names):
            continue
        if other := [others[label_of(user)] for user in users if label_of(user) in others]:
            refused[name] = other[0]
        elif len(users) > 1:
            refused[name] = f"it is used by {len(users)} nodes, and may stand for other parameters of equal value"
        else:
            found[name] = Exposure(name, value, user=users[0])
    return Exposures(tuple(found.values()), refused)


def agreeing(graphs: Sequence[Exposures]) -> list[Exposures]:
    """Of several graphs, what each can expose that none of the others refuses: an adapter must reach all of them."""
    refused = {name: reason for graph in graphs for name, reason in graph.refused.items()}
    agreed: list[Exposures] = []
    for graph in graphs:
        names = {exposure.name: exposure.name.rpartition(".")[0] for exposure in graph.found}
        lost = {
            name: refused.get(name, refused.get(names[name])) for name in names if {name, names[name]} & set(refused)
        }
        kept = tuple(exposure for exposure in graph.found if exposure.name not in lost)
        agreed.append(Exposures(kept, graph.refused | {name: f"in another graph {why}" for name, why in lost.items()}))
    return agreed


def _own_users(value: ir.Value, weights: set[tuple[ir.Node, int]]) -> list[ir.Node]:
    """The nodes that compute with a parameter as it is: not as a linear module's weight, of which `weights` are the
    places, and nothing behind an Identity or a Transpose, which stand for another parameter."""
    uses = [use for use in value.uses() if use.node.op_type not in ("Cast", "Identity", "Transpose")]
    return list(dict.fromkeys(use.node for use in uses if (use.node, use.idx) not in weights))


def check_names(replaceable: str | Sequence[str], graphs: Sequence[Exposures], modules: Sequence[str]) -> None:
    """Raises ModelError: one of the names given means nothing that can be replaced in any graph."""
    if replaceable == HEADS_ONLY:
        return
    found = {exposure.name for graph in graphs for exposure in graph.found}
    refused = {name: reason for graph in graphs for name, reason in graph.refused.items()}
    problems: list[str] = []
    for name in _names(replaceable):
        reasons = [f"{what}: {why}" for what, why in refused.items() if what not in found and _asked_any(what, name)]
        if reasons:
            problems.extend(reasons)
        elif not any(_asked(parameter, (name,)) for parameter in found):
            problems.append(f"{name}: nothing of that name; linear modules end with {_suffixes(modules)}")
    if problems:
        raise ModelError("replaceable must name modules or parameters that can be replaced", problems=problems)


def outputs_behind(exposure: Exposure) -> tuple[str, ...]:
    """The graph outputs that a head's result reaches without meeting another weight; none for other weights."""
    if exposure.linear is None or exposure.linear.adds_more:
        return ()
    last = exposure.linear.bias[0] if exposure.linear.bias is not None else exposure.linear.node
    reached: dict[str, None] = {}
    seen: set[ir.Node] = set()
    waiting = [last.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            reached[value.name or ""] = None
        for use in value.uses():
            if use.node.op_type in _WEIGHING:
                return ()
            if use.node not in seen:
                seen.add(use.node)
                waiting.extend(use.node.outputs)
    return tuple(reached)


def _names(replaceable: str | Iterable[str]) -> tuple[str, ...]:
    if replaceable == HEADS_ONLY:
        return CLASSIFIERS
    return (replaceable,) if isinstance(replaceable, str) else tuple(replaceable)


def _suffixes(modules: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in modules}))


def _not_whole(used: Sequence[Site], module: str) -> str | None:
    """Why a linear module's weight cannot be replaced, or None."""
    if len(used) > 1:
        return f"it is used by {len(used)} nodes, and only the weights of modules used once can be replaced"
    if len(used[0].linears) > 1:
        others = ", ".join(other for other in used[0].modules if other != module)
        return f"it is packed into one weight with {others}" if others else "its weight is cut into several"
    if used[0].linears[0].product.quantized is not None:
        return "its weight is quantized; quantize the model without it"
    return None


def _of_linear(site: Site, module: str) -> list[Exposure]:
    linear = next(linear for linear in site.linears if linear.module == module)
    exposures = [Exposure(f"{module}.weight", linear.weight, site)]
    if linear.bias is not None:
        node, position = linear.bias
        bias, _ = unwrap(node.inputs[position])
        assert bias is not None  # what a bias is
        exposures.append(Exposure(f"{module}.bias", bias, site, is_bias=True))
    return exposures


def _asked(parameter: str, names: Sequence[str]) -> bool:
    named = any(parameter == name or parameter.endswith(f".{name}") for name in names)
    return named or matches(parameter.rpartition(".")[0], names)


def _asked_any(module_or_parameter: str, name: str) -> bool:
    return _asked(module_or_parameter, (name,)) or matches(module_or_parameter, (name,))


def _named_initializers(graph: ir.Graph) -> dict[str, ir.Value]:
    """Float initializers by torch name: their own, or that of an Identity that stands for them."""
    named: dict[str, ir.Value] = {}
    for name, value in graph.initializers.items():
        if _is_float(value) and "." in name and "::" not in name:
            named[name] = value
    for node in graph:
        name = node.outputs[0].name or "" if node.op_type == "Identity" else ""
        if "." in name and "/" not in name:
            source, wrappers = unwrap(node.outputs[0])
            if source is not None and _is_float(source) and all(wrapper.op_type == "Identity" for wrapper in wrappers):
                named[name] = node.outputs[0]
    return named


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point() and value.dtype.numpy().name in FLOAT_TYPES
