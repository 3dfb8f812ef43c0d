"""What is located, weighed against what torch did and what the graph shows: modules that may compute something else
here are unproven, and those that do have no place."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx_ir as ir

from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.exporter.locating.located import Located, Occurrence
from onnx_lora.exporter.locating.surroundings import Surroundings
from onnx_lora.exporter.locating.traces import Traces

__all__ = ["drop_miscounted", "note_doubts"]

# Why a product is no call of the module whose weight it multiplies with.
_IN_PARENT = "the module around it computes with its weight, and PEFT's delta is beside the module alone"


def note_doubts(located: Located, graph: ir.Graph, traces: Traces, *, named: bool) -> Located:
    """Mark occurrences as unproven where an optimiser, or the module itself, may compute something else.

    `named`: nothing but names told which module a node is of.
    """
    surroundings = Surroundings.of(graph, [one.product for one in located.occurrences])
    placed = {one.module for one in located.occurrences}
    doubted: list[Occurrence] = []
    for one in located.occurrences:
        doubt = traces.of_calls(one.product)
        if not doubt:
            doubt = _doubt_twins(one, placed)
        if not doubt and not traces.built:
            doubt = surroundings.doubt(one.product)
        if not doubt and surroundings.in_parent(one.product, one.module):
            doubt = _IN_PARENT
        if not doubt and named:
            doubt = traces.of_weight(one.product)
        doubted.append(replace(one, unproven=one.unproven or doubt))
    return replace(located, occurrences=tuple(doubted))


def _doubt_twins(one: Occurrence, placed: set[str]) -> str:
    """Why a node may stand for a module with an equal weight too, or nothing: exporters compute such modules once."""
    for twin in one.twins:
        if twin not in placed:
            return f"{twin} has the same weight and no node of its own: this one may stand for both"
    return ""


def drop_miscounted(located: Located, graph: ir.Graph, calls: Calls) -> Located:
    """Take out the modules that torch calls more or less often than the graph does, or that compute more than x · W0.

    Where the graph has fewer nodes than torch has calls, a call has become a constant. Where it has more, something
    else computes with the weight, and the adapter would act there although PEFT's does not.
    """
    surroundings = Surroundings.of(graph, [one.product for one in located.occurrences])
    nodes = Counter(one.module for one in located.occurrences if one.first == 0)
    reasons: dict[str, str] = {}
    for one in located.occurrences:
        reason = calls.doubt(one.module, nodes)
        if not reason and one.module in calls.overridden:
            reason = surroundings.beside(one.product)
        if not reason and surroundings.in_parent(one.product, one.module):
            reason = _IN_PARENT
        if reason:
            reasons[one.module] = reason
    return located.without(reasons, other_weight=True)
