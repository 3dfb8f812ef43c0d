"""What a package takes of all that its graphs offer: first what every graph agrees to, then what the user asked for.
It changes no graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnx_lora.errors import ModelError
from onnx_lora.exporter.request import Points
from onnx_lora.exporter.sites.find_sites import settle
from onnx_lora.exporter.sites.offer import LocatedGraph, Offer
from onnx_lora.exporter.sites.site import Sites, WholeWeightSites
from onnx_lora.exporter.sites.targets import ALL_LINEAR, select
from onnx_lora.exporter.sites.whole_weights import (
    check_names,
    drop_miscounted_weights,
    find_whole_weights,
    keep_agreeing,
)
from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeights
from onnx_lora.heads import OUTPUT_LAYERS

__all__ = ["agree_on_offers", "choose_modules"]


def agree_on_offers(graphs: Sequence[LocatedGraph], asked: Points) -> list[Offer]:
    """What each graph offers of what no other graph refuses."""
    settled = settle([graph.sites for graph in graphs])
    found: list[WholeWeightSites] = []
    for graph, sites in zip(graphs, settled, strict=True):
        found.append(_find_whole_weights(graph, sites, asked))
    offers: list[Offer] = []
    for graph, sites, whole_weights in zip(graphs, settled, keep_agreeing(found), strict=True):
        offers.append(Offer(graph, sites, whole_weights))
    return offers


def _find_whole_weights(graph: LocatedGraph, sites: Sites, asked: Points) -> WholeWeightSites:
    source = graph.source
    found = find_whole_weights(
        graph.model.graph, sites, asked.replaceable, prefix=source.prefix, parameters=graph.parameters
    )
    if source.calls is None:
        return found
    return drop_miscounted_weights(found, source.calls, prefix=source.prefix)


def choose_modules(offers: Sequence[Offer], asked: Points, weights: CheckpointWeights | None) -> frozenset[str]:
    """The modules that get points. `weights`: the model's, where they are known.

    Raises ModelError: no module that is asked for can have a point.
    """
    modules = _modules_of(offer.sites for offer in offers)
    if not modules:
        must = "an injection point needs a node with a weight (MatMul, Gemm, Conv, Gather)"
        raise _nothing_placed(must, offers)
    check_names(asked.replaceable, [offer.whole_weights for offer in offers], list(modules))
    heads = OUTPUT_LAYERS if weights is None or weights.heads is None else weights.heads
    found = [offer.graph.sites for offer in offers]
    wanted = select(list(_modules_of(found)), asked.targets, heads=heads, others=_other_than_linear(found))
    replaced = _replaced_modules(offers)
    if asked.targets in (ALL_LINEAR, (ALL_LINEAR,)):
        wanted -= replaced  # as PEFT leaves out what modules_to_save holds
    chosen = wanted.intersection(modules)
    if not chosen and not replaced:
        must = f"of targets {asked.targets!r} one at least must get a point"
        raise _nothing_placed(must, offers)
    return chosen


def _modules_of(graphs: Iterable[Sites]) -> tuple[str, ...]:
    """The modules of several graphs, in their order."""
    modules: dict[str, None] = {}
    for sites in graphs:
        modules.update(dict.fromkeys(sites.modules))
    return tuple(modules)


def _replaced_modules(offers: Sequence[Offer]) -> set[str]:
    """The linear modules whose whole weight an adapter may replace."""
    replaced: set[str] = set()
    for offer in offers:
        for weight in offer.whole_weights.found:
            if weight.occurrence is not None:
                replaced.add(weight.occurrence.module)
    return replaced


def _other_than_linear(graphs: Sequence[Sites]) -> set[str]:
    """The modules that "all-linear" does not mean."""
    others: set[str] = set()
    for sites in graphs:
        for one in sites.occurrences:
            if not one.graph_kind.is_linear:
                others.add(one.module)
    return others


def _nothing_placed(must: str, offers: Sequence[Offer]) -> ModelError:
    problems: list[str] = []
    for offer in offers:
        for node in offer.sites.unplaced:
            problems.append(f"{node.node}: {node.reason}")
    if not problems:
        problems = ["the graph has no such node with a constant weight"]
    path = offers[0].graph.source.file
    return ModelError(f"{must}, and none could be placed", path=path, problems=problems)
