"""Give every weight that may be folded or replaced an initializer that nothing else uses.

Requires: located nodes of an unchanged graph. Ensures: the same computation, in which tied weights
(embeddings and head, values that an exporter found equal and shared) are two names for the same
bytes, so that changing the one never changes the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnx_lora.exporter.expose import Exposure
from onnx_lora.exporter.inject import Site
from onnx_lora.exporter.locate import Linear, unwrap
from onnx_lora.exporter.surgery import Surgeon

__all__ = ["own_exposures", "own_weights"]


def own_weights(surgeon: Surgeon, sites: Sequence[Site]) -> list[Site]:
    """The sites, each module's weight in an initializer of its own."""
    owned: list[Site] = []
    copies: dict[tuple[tuple[str, ...], str], ir.Value] = {}
    for site in sites:
        modules = tuple(linear.module for linear in site.linears)
        own_nodes = {other.node for other in sites if tuple(linear.module for linear in other.linears) == modules}
        first = site.linears[0]
        if set(_users(first.weight)) <= own_nodes:
            owned.append(site)
            continue
        key = modules, first.weight.name or ""
        if key not in copies:
            copies[key] = surgeon.own_copy(first.weight, f"{first.module}.weight")
        wrappers = _rewire(surgeon, site.node, 1, copies[key], first.wrappers)
        linears = [replace(linear, weight=copies[key], wrappers=wrappers) for linear in site.linears]
        owned.append(Site(tuple(linears)))
    return owned


def own_exposures(surgeon: Surgeon, exposures: Sequence[Exposure], linears: Sequence[Linear]) -> list[Exposure]:
    """The exposures, each value in an initializer of its own. The weights of linear nodes must be owned already."""
    weights = {linear.module: linear for linear in linears}
    owned: list[Exposure] = []
    for exposure in exposures:
        if exposure.linear is None:
            owned.append(replace(exposure, value=_own_value(surgeon, exposure)))
            continue
        linear = weights[exposure.linear.module]
        value = _own_bias(surgeon, exposure, linear) if exposure.is_bias else linear.weight
        owned.append(replace(exposure, value=value, linear=linear))
    return owned


def _own_bias(surgeon: Surgeon, exposure: Exposure, linear: Linear) -> ir.Value:
    assert linear.bias is not None  # an exposed bias is there
    node, position = linear.bias
    initializer, wrappers = unwrap(node.inputs[position])
    assert initializer is not None
    if set(_users(initializer)) <= {node}:
        return initializer
    copy = surgeon.own_copy(initializer, exposure.name)
    _rewire(surgeon, node, position, copy, wrappers)
    return copy


def _own_value(surgeon: Surgeon, exposure: Exposure) -> ir.Value:
    """Every direct use is the parameter's own; an Identity or a Transpose stands for another one."""
    initializer, _ = unwrap(exposure.value)
    assert initializer is not None
    own_uses = [use for use in exposure.value.uses() if use.node.op_type not in ("Identity", "Transpose")]
    if exposure.value is initializer and len(own_uses) == len(initializer.uses()):
        return initializer
    copy = surgeon.own_copy(initializer, exposure.name)
    for use in own_uses:
        use.node.replace_input_with(use.idx, copy)
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


def _users(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute with an initializer, looking through its wrappers."""
    for use in value.uses():
        if use.node.op_type in ("Cast", "Identity", "Transpose"):
            yield from _users(use.node.outputs[0])
        else:
            yield use.node
    if value.is_graph_output():
        producer = value.producer()
        if producer is not None:
            yield producer
