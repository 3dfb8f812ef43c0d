"""Heads: the modules whose number of outputs an adapter may choose, because nothing behind them counts on it. It reads
the graph and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_lora.exporter.graph.axes import outputs_are_free
from onnx_lora.exporter.sites.site import WholeWeightSite

__all__ = ["find_free_modules"]

# Operators that end a head: what comes behind them has a size of its own.
_WEIGHING = frozenset(["Conv", "Gemm", "LayerNormalization", "MatMul"])


def find_free_modules(model: ir.Model, weights: Sequence[WholeWeightSite]) -> frozenset[str]:
    """The modules whose number of outputs an adapter may choose: the heads."""
    axes: dict[str, dict[str, int]] = {}
    behind: dict[str, tuple[str, ...]] = {}
    for weight in weights:
        outputs = _outputs_behind(weight)
        if weight.occurrence is None or not outputs:
            continue
        module = weight.occurrence.module
        axis = 0 if weight.is_bias or weight.occurrence.product.transposed else 1
        axes.setdefault(module, {})[weight.value.name or ""] = axis
        behind[module] = outputs
    return frozenset(module for module in axes if outputs_are_free(model, axes[module], behind[module]))


def _outputs_behind(weight: WholeWeightSite) -> tuple[str, ...]:
    """The graph outputs that a head's result reaches without meeting another weight; none for other weights."""
    one = weight.occurrence
    if one is None or one.adds_more:
        return ()
    last = one.node if one.bias is None else one.bias[0]
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
