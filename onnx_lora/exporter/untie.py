"""Give every weight that may be folded or replaced an initializer that nothing else uses.

Requires: settled sites of an unchanged graph. Ensures: the same computation, in which tied weights
(embeddings and head, values that an exporter found equal and shared) are two names for the same
bytes, so that changing the one never changes the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnx_lora.exporter.products import Operand, Product, unwrap
from onnx_lora.exporter.sites import Site
from onnx_lora.exporter.surgery import Surgeon
from onnx_lora.exporter.whole_weights import Exposure

__all__ = ["own_exposures", "own_weights"]


def own_weights(surgeon: Surgeon, sites: Sequence[Site]) -> list[Site]:
    """The sites, each module's weight in initializers of its own."""
    together: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        together.setdefault(site.modules, []).append(site)
    owned = {modules: iter(_own_together(surgeon, same)) for modules, same in together.items()}
    return [next(owned[site.modules]) for site in sites]


def _own_together(surgeon: Surgeon, sites: Sequence[Site]) -> list[Site]:
    """All the sites of one set of modules: every call of a shared module reads the same initializers."""
    readers = _readers(sites)
    copies: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    owned: list[Site] = []
    for site in sites:
        products: dict[ir.Node, Product] = {}
        for product in site.products:
            weight, mine = product.weight.value, dict[ir.Value, ir.Value]()
            for operand in product.operands:
                key = weight, operand.value
                if key not in copies:
                    copies[key] = _own_operand(surgeon, operand, site.modules[0], product, readers[weight])
                if copies[key] is not operand.value:
                    mine[operand.value] = copies[key]
            products[product.node] = _reading(surgeon, product, mine)
        linears = tuple(replace(linear, product=products[linear.node]) for linear in site.linears)
        owned.append(replace(site, linears=linears))
    return owned


def _readers(sites: Sequence[Site]) -> dict[ir.Value, set[ir.Node]]:
    """By weight, the nodes that compute with it for one set of modules, its scales included: all calls of a shared
    module, and not the other pieces of one that was cut up."""
    readers: dict[ir.Value, set[ir.Node]] = {}
    for site in sites:
        for product in site.products:
            nodes = readers.setdefault(product.weight.value, set())
            nodes.add(product.node)
            nodes.update(operand.node for operand in product.operands)
    return readers


def _own_operand(
    surgeon: Surgeon, operand: Operand, module: str, product: Product, readers: Collection[ir.Node]
) -> ir.Value:
    """The initializer itself where only `readers` use it, else a copy."""
    if _used_by(operand.value, readers):
        return operand.value
    name = "weight" if operand is product.weight else operand.value.name
    return surgeon.own_copy(operand.value, f"{module}.{name}")


def _reading(surgeon: Surgeon, product: Product, mine: Mapping[ir.Value, ir.Value]) -> Product:
    """The product, with initializers of `mine` in the place of its own."""
    if not mine:
        return product
    moved = _rewire(surgeon, product.node, product.factor, mine, product.path)
    for operand in product.operands:
        if operand.node not in product.path and operand.value in mine:
            operand.node.replace_input_with(operand.position, mine[operand.value])

    def own(operand: Operand) -> Operand:
        return replace(operand, value=mine.get(operand.value, operand.value))

    quantized = product.quantized
    if quantized is not None:
        zero = quantized.zero_point
        quantized = replace(quantized, scale=own(quantized.scale), zero_point=None if zero is None else own(zero))
    wrappers = tuple(moved[wrapper] for wrapper in product.wrappers if wrapper in moved)
    return replace(product, weight=own(product.weight), quantized=quantized, wrappers=wrappers)


def own_exposures(surgeon: Surgeon, exposures: Sequence[Exposure], sites: Sequence[Site]) -> list[Exposure]:
    """The exposures, each value in an initializer of its own. The sites' weights must be owned already."""
    by_node = {site.node: site for site in sites}
    owned: list[Exposure] = []
    for exposure in exposures:
        if exposure.site is None:
            point = by_node.get(exposure.user) if exposure.user is not None else None
            own = None if point is None else point.linears[0].product.weight
            # The weight of an embedding or a convolution that has a point too is its own already.
            is_weight = own is not None and own.node is exposure.user and exposure.name.endswith(".weight")
            value = own.value if own is not None and is_weight else _own_value(surgeon, exposure)
            owned.append(replace(exposure, value=value))
            continue
        site = by_node[exposure.site.node]
        value = _own_bias(surgeon, exposure, site) if exposure.is_bias else site.linears[0].weight
        owned.append(replace(exposure, value=value, site=site))
    return owned


def _own_bias(surgeon: Surgeon, exposure: Exposure, site: Site) -> ir.Value:
    found = site.linears[0].bias
    assert found is not None  # an exposed bias is there
    node, position = found
    initializer, wrappers = unwrap(node.inputs[position])
    assert initializer is not None
    if _used_by(initializer, {node}):
        return initializer
    copy = surgeon.own_copy(initializer, exposure.name)
    _rewire(surgeon, node, position, {initializer: copy}, wrappers)
    return copy


def _own_value(surgeon: Surgeon, exposure: Exposure) -> ir.Value:
    initializer, _ = unwrap(exposure.value)
    user = exposure.user
    assert initializer is not None
    assert user is not None  # what is no linear module's has one
    if _used_by(initializer, {user}):
        return initializer
    copy = surgeon.own_copy(initializer, f"{exposure.name}.own")
    for use in [use for use in exposure.value.uses() if use.node is user]:
        user.replace_input_with(use.idx, copy)
    producer = exposure.value.producer()
    if producer is not None:
        surgeon.drop_dead(producer)
    return copy


def _rewire(
    surgeon: Surgeon, node: ir.Node, position: int, mine: Mapping[ir.Value, ir.Value], path: Collection[ir.Node]
) -> dict[ir.Node, ir.Node]:
    """Let `node` read the initializers of `mine` through copies of the nodes of its `path` (Identity left
    out); gives the copies."""
    copies: dict[ir.Node, ir.Node] = {}

    def copied(value: ir.Value) -> ir.Value:
        maker = value.producer()
        if value in mine or maker is None or maker not in path:
            return mine.get(value, value)
        inputs = [copied(source) for source in maker.inputs if source is not None]
        if maker.op_type == "Identity":
            return inputs[0]
        attributes = {name: attribute.value for name, attribute in maker.attributes.items()}
        surgeon.insert_before(node)
        copy = surgeon.op(maker.op_type, *inputs, name=f"{inputs[0].name}.{maker.op_type}", **attributes)
        producer = copy.producer()
        assert producer is not None
        copies[maker] = producer
        return copy

    previous = node.inputs[position]
    assert previous is not None  # what is rewired is there
    node.replace_input_with(position, copied(previous))
    if (old := previous.producer()) is not None:
        surgeon.drop_dead(old)
    return copies


def _used_by(initializer: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether nothing else computes with it."""
    return all(user in nodes for user in _users(initializer))


def _users(value: ir.Value) -> Iterator[ir.Node | None]:
    """The nodes that compute with an initializer, looking through its wrappers and dequantization; None for
    the graph's caller, who gets it, or what a wrapper made of it, as an output."""
    if value.is_graph_output():
        yield None
    for use in value.uses():
        if use.node.op_type in ("Cast", "DequantizeLinear", "Identity", "Transpose"):
            yield from _users(use.node.outputs[0])
        else:
            yield use.node
