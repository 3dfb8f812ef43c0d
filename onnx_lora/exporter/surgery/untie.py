"""Give every weight that may be folded or replaced an initializer that nothing else uses.

Requires: settled sites of an unchanged graph. Ensures: the same computation, in which tied weights
(embeddings and head, values that an exporter found equal and shared) are two names for the same
bytes, so that changing the one never changes the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnx_lora.exporter.graph.product import Operand, Product, Quantized
from onnx_lora.exporter.graph.values import WRAPPERS, initializer_behind, unwrap
from onnx_lora.exporter.locating.located import Occurrence
from onnx_lora.exporter.sites.site import Site, WholeWeightSite
from onnx_lora.exporter.surgery.surgeon import Surgeon

__all__ = ["untie_weights", "untie_whole_weights"]

# Operators behind which a weight is still that weight.
_LOOKED_THROUGH = WRAPPERS | {"DequantizeLinear"}


def untie_weights(surgeon: Surgeon, sites: Sequence[Site]) -> list[Site]:
    """The sites, each module's weight in initializers of its own."""
    together: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        together.setdefault(site.modules, []).append(site)
    untied: dict[tuple[str, ...], Iterator[Site]] = {}
    for modules, same in together.items():
        untied[modules] = iter(_untie_together(surgeon, same))
    return [next(untied[site.modules]) for site in sites]


def _untie_together(surgeon: Surgeon, sites: Sequence[Site]) -> list[Site]:
    """All the sites of one set of modules: every call of a shared module reads the same initializers."""
    readers = _find_readers(sites)
    # The initializers of each weight's own, by the weight and by what took their part before.
    copies: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    untied: list[Site] = []
    for site in sites:
        products: dict[ir.Node, Product] = {}
        for product in site.products:
            weight = product.weight.value
            moved: dict[ir.Value, ir.Value] = {}
            for operand in product.operands:
                key = weight, operand.value
                if key not in copies:
                    copies[key] = _untie_operand(surgeon, operand, site.modules[0], product, readers[weight])
                if copies[key] is not operand.value:
                    moved[operand.value] = copies[key]
            products[product.node] = _read_from(surgeon, product, moved)
        untied.append(_with_products(site, products))
    return untied


def _with_products(site: Site, products: Mapping[ir.Node, Product]) -> Site:
    """The site with other products at the same nodes."""
    occurrences: list[Occurrence] = []
    for one in site.occurrences:
        product = products[one.node]
        occurrences.append(replace(one, product=product))
    return replace(site, occurrences=tuple(occurrences))


def _find_readers(sites: Sequence[Site]) -> dict[ir.Value, set[ir.Node]]:
    """By weight, the nodes that compute with it for one set of modules, its scales included: all calls of a shared
    module, and not the other pieces of one that was cut up."""
    readers: dict[ir.Value, set[ir.Node]] = {}
    for site in sites:
        for product in site.products:
            nodes = readers.setdefault(product.weight.value, set())
            nodes.add(product.node)
            nodes.update(operand.node for operand in product.operands)
    return readers


def _untie_operand(
    surgeon: Surgeon, operand: Operand, module: str, product: Product, readers: Collection[ir.Node]
) -> ir.Value:
    """The initializer itself where only `readers` use it, else a copy."""
    initializer = operand.value
    if _is_used_by(initializer, readers):
        return initializer
    name = initializer.name
    if operand is product.weight:
        name = "weight"
    return surgeon.own_copy(initializer, f"{module}.{name}")


def _read_from(surgeon: Surgeon, product: Product, moved: Mapping[ir.Value, ir.Value]) -> Product:
    """The product, reading what its initializers were `moved` to."""
    if not moved:
        return product
    copied = _rewire(surgeon, product.node, product.weight_input, moved, product.path)
    for operand in product.operands:
        if operand.node not in product.path and operand.value in moved:
            operand.node.replace_input_with(operand.position, moved[operand.value])
    weight = _move(product.weight, moved)
    quantized = _move_quantized(product.quantized, moved)
    wrappers = tuple(copied[wrapper] for wrapper in product.wrappers if wrapper in copied)
    return replace(product, weight=weight, quantized=quantized, wrappers=wrappers)


def _move_quantized(quantized: Quantized | None, moved: Mapping[ir.Value, ir.Value]) -> Quantized | None:
    if quantized is None:
        return None
    zero_point = quantized.zero_point
    if zero_point is not None:
        zero_point = _move(zero_point, moved)
    return replace(quantized, scale=_move(quantized.scale, moved), zero_point=zero_point)


def _move(operand: Operand, moved: Mapping[ir.Value, ir.Value]) -> Operand:
    return replace(operand, value=moved.get(operand.value, operand.value))


def untie_whole_weights(
    surgeon: Surgeon, weights: Sequence[WholeWeightSite], sites: Sequence[Site]
) -> list[WholeWeightSite]:
    """The whole weights, each in an initializer of its own. The sites' weights must be untied already."""
    by_node = {site.node: site for site in sites}
    untied: list[WholeWeightSite] = []
    for weight in weights:
        if weight.site is None:
            pointed = None if weight.user is None else by_node.get(weight.user)
            value = _untie_value(surgeon, weight, pointed)
            untied.append(replace(weight, value=value))
            continue
        site = by_node[weight.site.node]
        value = site.occurrences[0].weight  # untied with the site
        if weight.is_bias:
            value = _untie_bias(surgeon, weight, site)
        untied.append(replace(weight, value=value, site=site))
    return untied


def _untie_bias(surgeon: Surgeon, weight: WholeWeightSite, site: Site) -> ir.Value:
    found = site.occurrences[0].bias
    assert found is not None  # a bias that may be replaced is there
    node, position = found
    initializer, wrappers = unwrap(node.inputs[position])
    assert initializer is not None
    if _is_used_by(initializer, {node}):
        return initializer
    copy = surgeon.own_copy(initializer, weight.name)
    _rewire(surgeon, node, position, {initializer: copy}, wrappers)
    return copy


def _untie_value(surgeon: Surgeon, weight: WholeWeightSite, pointed: Site | None) -> ir.Value:
    """`pointed`: the site of the node that computes with the weight, where it has a point too."""
    user = weight.user
    assert user is not None  # what is no linear module's has one
    if pointed is not None and weight.name.endswith(".weight"):
        own = pointed.occurrences[0].product.weight
        # The weight of an embedding or a convolution that has a point too is its own already.
        if own.node is user or weight.table_reader is not None:
            return own.value
    initializer = initializer_behind(weight.value)
    assert initializer is not None
    if _is_used_by(initializer, {user}):
        return initializer
    copy = surgeon.own_copy(initializer, f"{weight.name}.own")
    if weight.table_reader is not None:
        _, wrappers = unwrap(user.inputs[0])
        _rewire(surgeon, user, 0, {initializer: copy}, wrappers)
        return copy
    for use in list(weight.value.uses()):
        if use.node is user:
            user.replace_input_with(use.idx, copy)
    producer = weight.value.producer()
    if producer is not None:
        surgeon.drop_dead(producer)
    return copy


def _rewire(
    surgeon: Surgeon, node: ir.Node, position: int, moved: Mapping[ir.Value, ir.Value], path: Collection[ir.Node]
) -> dict[ir.Node, ir.Node]:
    """Let `node` read what initializers were `moved` to, through copies of the nodes of its `path`. An Identity is left
    out. Gives the copies by the nodes that they are copies of."""
    copies: dict[ir.Node, ir.Node] = {}

    def copy_value(value: ir.Value) -> ir.Value:
        maker = value.producer()
        if value in moved or maker is None or maker not in path:
            return moved.get(value, value)
        inputs = [copy_value(source) for source in maker.inputs if source is not None]
        if maker.op_type == "Identity":
            return inputs[0]
        attributes = {key: attribute.value for key, attribute in maker.attributes.items()}
        name = f"{inputs[0].name}.{maker.op_type}"
        surgeon.insert_before(node)
        copy = surgeon.op(maker.op_type, *inputs, name=name, **attributes)
        producer = copy.producer()
        assert producer is not None
        copies[maker] = producer
        return copy

    previous = node.inputs[position]
    assert previous is not None  # what is rewired is there
    node.replace_input_with(position, copy_value(previous))
    old = previous.producer()
    if old is not None:
        surgeon.drop_dead(old)
    return copies


def _is_used_by(initializer: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether nothing else computes with it."""
    return all(user in nodes for user in _users_of(initializer))


def _users_of(value: ir.Value) -> Iterator[ir.Node | None]:
    """The nodes that compute with an initializer, looking through its wrappers and dequantization; None for
    the graph's caller, who gets it, or what a wrapper made of it, as an output."""
    if value.is_graph_output():
        yield None
    for use in value.uses():
        if use.node.op_type in _LOOKED_THROUGH:
            yield from _users_of(use.node.outputs[0])
        else:
            yield use.node
