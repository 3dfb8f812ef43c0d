"""Which whole weights an adapter may replace: the parameters behind the names a user gives, and where
each lies in the graph. It reads the graph and changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.exporter.graph.values import WRAPPERS, initializer_behind, unwrap
from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.exporter.locating.located import label_of
from onnx_lora.exporter.locating.parameters import ParameterNames
from onnx_lora.exporter.sites.site import Site, Sites, WholeWeightSite, WholeWeightSites
from onnx_lora.exporter.sites.targets import HEADS_ONLY
from onnx_lora.heads import CLASSIFIERS
from onnx_lora.points import FLOAT_TYPES, matches

__all__ = ["check_names", "drop_miscounted_weights", "find_whole_weights", "keep_agreeing"]

_NO_NAMES = ParameterNames()


def find_whole_weights(
    graph: ir.Graph,
    sites: Sites,
    replaceable: str | Sequence[str],
    *,
    prefix: str = "",
    parameters: ParameterNames = _NO_NAMES,
) -> WholeWeightSites:
    """The parameters that `replaceable` names (modules, or parameters, or suffixes of either); `prefix` is put before
    the names that the graph has. `parameters`: what the graph's vectors are called in the checkpoint.

    A linear module's weight takes its bias along. A bias asked for by itself keeps its place, and has no rows.
    """
    names = _as_names(replaceable)
    of_linear = _find_of_linear(sites, names)
    of_tables = _find_of_tables(sites, names)
    found = {weight.name: weight for weight in (*of_linear.found, *of_tables.found)}
    refused = {**of_linear.refused, **of_tables.refused}
    taken = {weight.value for weight in found.values()}
    places = _weight_places(sites)
    others = {node.node: node.reason for node in sites.unplaced if node.other_weight}
    for own_name, value in _named_initializers(graph).items():
        torch_name = parameters.names.get(own_name, own_name)
        name = prefix + torch_name
        if name in found or value in taken or not _is_asked(name, names):
            continue
        if torch_name in parameters.refused:
            refused[name] = parameters.refused[torch_name]
            continue
        users = _own_users(value, places)
        if not users:  # it is a linear module's weight
            continue
        reason = _refuse_users(users, others)
        if reason is not None:
            refused[name] = reason
        else:
            found[name] = WholeWeightSite(name, value, user=users[0])
    return WholeWeightSites(tuple(found.values()), refused)


def _find_of_linear(sites: Sites, names: Sequence[str]) -> WholeWeightSites:
    """The weights and biases of linear modules that are asked for."""
    uses: dict[str, list[Site]] = {}
    for site in sites.sites:
        if site.graph_kind.is_linear:
            for module in site.modules:
                uses.setdefault(module, []).append(site)
    found: list[WholeWeightSite] = []
    refused: dict[str, str] = {}
    for module, used in uses.items():
        if not _is_asked(f"{module}.weight", names):
            continue
        reason = _refuse_linear(used, module)
        if reason is not None:
            refused[module] = reason
        else:
            found.extend(_whole_weights_of(used[0], module))
    return WholeWeightSites(tuple(found), refused)


def _find_of_tables(sites: Sites, names: Sequence[str]) -> WholeWeightSites:
    """The tables of embeddings that are asked for, whatever the graph calls them and whether they are a head's weight
    too."""
    uses: dict[str, list[Site]] = {}
    for site in sites.sites:
        if site.graph_kind.looks_up and _is_asked(f"{site.modules[0]}.weight", names):
            uses.setdefault(site.modules[0], []).append(site)
    found: list[WholeWeightSite] = []
    refused: dict[str, str] = {}
    for module, used in uses.items():
        product = used[0].occurrences[0].product
        reason = _refuse_linear(used, module)
        if any(wrapper.op_type == "Cast" for wrapper in product.wrappers):
            reason = "its table is cast before it is read"
        if reason is not None:
            refused[f"{module}.weight"] = reason
        else:
            found.append(WholeWeightSite(f"{module}.weight", product.weight.value, user=product.node))
    return WholeWeightSites(tuple(found), refused)


def _whole_weights_of(site: Site, module: str) -> list[WholeWeightSite]:
    """A linear module's weight, and its bias where it has one."""
    one = next(one for one in site.occurrences if one.module == module)
    found = [WholeWeightSite(f"{module}.weight", one.weight, site)]
    if one.bias is not None:
        node, position = one.bias
        bias = initializer_behind(node.inputs[position])
        assert bias is not None  # what a bias is
        found.append(WholeWeightSite(f"{module}.bias", bias, site, is_bias=True))
    return found


def _refuse_linear(used: Sequence[Site], module: str) -> str | None:
    """Why a linear module's weight cannot be replaced, or None."""
    if len(used) > 1:
        return f"it is used by {len(used)} nodes, and only the weights of modules used once can be replaced"
    site = used[0]
    others = [other for other in site.modules if other != module]
    if others:
        return f"it is packed into one weight with {', '.join(others)}"
    if len(site.occurrences) > 1:
        return "its weight is cut into several"
    if site.occurrences[0].product.quantized is not None:
        return "its weight is quantized; quantize the model without it"
    return None


def _refuse_users(users: Sequence[ir.Node], others: Mapping[str, str]) -> str | None:
    """Why a parameter that `users` compute with cannot be replaced, or None. `others`: the labels of nodes that may
    compute with another weight than their module's, and why."""
    for user in users:
        if label_of(user) in others:
            return others[label_of(user)]
    if len(users) > 1:
        return f"it is used by {len(users)} nodes, and may stand for other parameters of equal value"
    return None


def _weight_places(sites: Sites) -> set[tuple[ir.Node, int]]:
    """Where linear modules' weights are read: nodes and input positions."""
    places: set[tuple[ir.Node, int]] = set()
    for site in sites.sites:
        if not site.graph_kind.is_linear:
            continue
        for product in site.products:
            places.add((product.node, product.weight_input))
            for operand in product.operands:
                places.add((operand.node, operand.position))
    return places


def _own_users(value: ir.Value, weights: Collection[tuple[ir.Node, int]]) -> list[ir.Node]:
    """The nodes that compute with a parameter as it is. `weights`: the places where linear modules' weights are read,
    which do not count; nor do nodes behind an Identity or a Transpose, which stand for another parameter."""
    users: dict[ir.Node, None] = {}
    for use in value.uses():
        if use.node.op_type not in WRAPPERS and (use.node, use.idx) not in weights:
            users[use.node] = None
    return list(users)


def keep_agreeing(graphs: Sequence[WholeWeightSites]) -> list[WholeWeightSites]:
    """Of several graphs, what each can replace that none of the others refuses: an adapter must reach all of them."""
    refused: dict[str, str] = {}
    for graph in graphs:
        refused.update(graph.refused)
    agreed: list[WholeWeightSites] = []
    for graph in graphs:
        kept: list[WholeWeightSite] = []
        reasons = dict(graph.refused)
        for weight in graph.found:
            reason = refused.get(weight.name, refused.get(weight.module))
            if reason is None:
                kept.append(weight)
            else:
                reasons[weight.name] = f"in another graph {reason}"
        agreed.append(WholeWeightSites(tuple(kept), reasons))
    return agreed


def drop_miscounted_weights(weights: WholeWeightSites, calls: Calls, *, prefix: str) -> WholeWeightSites:
    """The same without whole weights of modules that torch calls otherwise than once, as the graph shows them: another
    call of a norm may have become a constant. Linear modules were counted when they were located."""
    found: list[WholeWeightSite] = []
    refused = dict(weights.refused)
    for weight in weights.found:
        module = weight.name.removeprefix(prefix).rpartition(".")[0]
        called = calls.counts.get(module, 0)
        if weight.site is None and called != 1:
            refused[weight.name] = f"torch calls {module} {called} times, and the graph uses the weight once"
        else:
            found.append(weight)
    return WholeWeightSites(tuple(found), refused)


def check_names(replaceable: str | Sequence[str], graphs: Sequence[WholeWeightSites], modules: Sequence[str]) -> None:
    """Check that each of the given names means something that can be replaced in some graph.

    modules: those of all graphs, for the message.

    Raises ModelError: a name means nothing.
    """
    found: set[str] = set()
    refused: dict[str, str] = {}
    for graph in graphs:
        found.update(weight.name for weight in graph.found)
        refused.update(graph.refused)
    problems: list[str] = []
    for name in _given(replaceable):
        if name == HEADS_ONLY:  # not every model has one
            continue
        reasons: list[str] = []
        for what, why in refused.items():
            is_asked = _is_asked(what, (name,)) or matches(what, (name,))
            if is_asked and what not in found:
                reasons.append(f"{what}: {why}")
        problems.extend(reasons)
        is_found = any(_is_asked(parameter, (name,)) for parameter in found)
        if not reasons and not is_found:
            suffixes = sorted({module.rpartition(".")[2] for module in modules})
            problems.append(f"{name}: nothing of that name; modules end with {', '.join(suffixes)}")
    if problems:
        raise ModelError("replaceable must name modules or parameters that can be replaced", problems=problems)


def _as_names(replaceable: str | Iterable[str]) -> tuple[str, ...]:
    """The names that are asked for; "heads" stands for those of classifiers."""
    names: list[str] = []
    for name in _given(replaceable):
        names += CLASSIFIERS if name == HEADS_ONLY else [name]
    return tuple(names)


def _given(replaceable: str | Iterable[str]) -> tuple[str, ...]:
    return (replaceable,) if isinstance(replaceable, str) else tuple(replaceable)


def _is_asked(parameter: str, names: Sequence[str]) -> bool:
    """Whether one of `names` is the parameter's, or its end, or matches its module as PEFT's `modules_to_save` does."""
    for name in names:
        if parameter == name or parameter.endswith(f".{name}"):
            return True
    return matches(parameter.rpartition(".")[0], names)


def _named_initializers(graph: ir.Graph) -> dict[str, ir.Value]:
    """Float initializers by torch name: their own, or that of an Identity that stands for them."""
    named: dict[str, ir.Value] = {}
    for name, value in graph.initializers.items():
        if _is_float(value) and "." in name and "::" not in name:
            named[name] = value
    for node in graph:
        if node.op_type != "Identity":
            continue
        output = node.outputs[0]
        name = output.name or ""
        if "." not in name or "/" in name:
            continue
        source, wrappers = unwrap(output)
        is_unchanged = all(wrapper.op_type == "Identity" for wrapper in wrappers)
        if source is not None and _is_float(source) and is_unchanged:
            named[name] = output
    return named


def _is_float(value: ir.Value) -> bool:
    if value.dtype is None or not value.dtype.is_floating_point():
        return False
    return value.dtype.numpy().name in FLOAT_TYPES
