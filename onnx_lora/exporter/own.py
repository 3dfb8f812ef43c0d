"""Give every weight that may be folded or replaced an initializer that nothing else uses.

Requires: settled sites of an unchanged graph. Ensures: the same computation, in which tied weights
(embeddings and head, values that an exporter found equal and shared) are two names for the same
bytes, so that changing the one never changes the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnx_lora.exporter.expose import Exposure
from onnx_lora.exporter.locate import unwrap
from onnx_lora.exporter.sites import Site
from onnx_lora.exporter.surgery import Surgeon

__all__ = ["own_exposures", "own_weights"]


def own_weights(surgeon: Surgeon, sites: Sequence[Site]) -> list[Site]:
    """The sites, each module's weight in an initializer of its own."""
    owned: list[Site] = []
    copies: dict[tuple[tuple[str, ...], ir.Value], ir.Value] = {}
    for site in sites:
        own_nodes = {other.node for other in sites if other.modules == site.modules}
        first = site.linears[0]
        if set(_users(first.weight)) <= own_nodes:
            owned.append(site)
            continue
        key = site.modules, first.weight
        if key not in copies:
            copies[key] = surgeon.own_copy(first.weight, f"{first.module}.weight")
        wrappers = _rewire(surgeon, site.node, 1, copies[key], first.wrappers)
        linears = [replace(linear, weight=copies[key], wrappers=wrappers) for linear in site.linears]
        owned.append(replace(site, linears=tuple(linears)))
    return owned


def own_exposures(surgeon: Surgeon, exposures: Sequence[Exposure], sites: Sequence[Site]) -> list[Exposure]:
    """The exposures, each value in an initializer of its own. The sites' weights must be owned already."""
    by_node = {site.node: site for site in sites}
    owned: list[Exposure] = []
    for exposure in exposures:
        if exposure.site is None:
            owned.append(replace(exposure, value=_own_value(surgeon, exposure)))
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
    if set(_users(initializer)) <= {node}:
        return initializer
    copy = surgeon.own_copy(initializer, exposure.name)
    _rewire(surgeon, node, position, copy, wrappers)
    return copy


def _own_value(surgeon: Surgeon, exposure: Exposure) -> ir.Value:
    initializer, _ = unwrap(exposure.value)
    user = exposure.user
    assert initializer is not None
    assert user is not None  # what is no linear module's has one
    if set(_users(initializer)) <= {user}:
        return initializer
    copy = surgeon.own_copy(initializer, f"{exposure.name}.own")
    for use in [use for use in exposure.value.uses() if use.node is user]:
        user.replace_input_with(use.idx, copy)
    producer = exposure.value.producer()
    if producer is not None:
        surgeon.drop_dead(producer)
    return copy


def _rewire(
    surgeon: Surgeon, node: ir.Node, position: int, initializer: ir.Value, wrappers: Sequence[ir.Node]
) -> tuple[ir.Node, ...]:
    """Let `node` read `initializer` through copies of its `wrappers` (nearest first; Identity left out)."""
    value = initializer
    copies: list[ir.Node] = []
    previous = node.inputs[position]
    for wrapper in reversed(wrappers):
        if wrapper.op_type == "Identity":
            continue
        surgeon.insert_after(wrapper)
        attributes = {name: attribute.value for name, attribute in wrapper.attributes.items()}
        value = surgeon.op(wrapper.op_type, value, name=f"{initializer.name}.{wrapper.op_type}", **attributes)
        producer = value.producer()
        assert producer is not None
        copies.insert(0, producer)
    node.replace_input_with(position, value)
    if previous is not None and (old := previous.producer()) is not None:
        surgeon.drop_dead(old)
    return tuple(copies)


def _users(value: ir.Value) -> Iterator[ir.Node | None]:
    """The nodes that compute with an initializer, looking through its wrappers; None for the graph's caller,
    who gets it, or what a wrapper made of it, as an output."""
    if value.is_graph_output():
        yield None
    for use in value.uses():
        if use.node.op_type in ("Cast", "Identity", "Transpose"):
            yield from _users(use.node.outputs[0])
        else:
            yield use.node
