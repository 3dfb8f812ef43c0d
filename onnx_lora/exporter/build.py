"""From ONNX files to a package: the order of the steps, and the manifest at the end.

Each graph is loaded and its modules are located. Then the graphs agree on what all of them can take, and the modules
that get points are chosen. Last, each graph is written twice: its base, where weights are untied, and with points."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from onnx_lora.exporter.foreign_libraries import name_step
from onnx_lora.exporter.frontends.source import Loaded
from onnx_lora.exporter.graph.axes import infer_shapes
from onnx_lora.exporter.intake.load import load
from onnx_lora.exporter.locating.doubts import drop_miscounted, note_doubts
from onnx_lora.exporter.locating.genai_names import rename
from onnx_lora.exporter.locating.locate import locate
from onnx_lora.exporter.locating.parameters import ParameterNames, name_built_parameters, name_parameters
from onnx_lora.exporter.locating.traces import find_traces
from onnx_lora.exporter.request import GraphFile, Points, Progress
from onnx_lora.exporter.sites.choose import agree_on_offers, choose_modules
from onnx_lora.exporter.sites.find_sites import find_sites
from onnx_lora.exporter.sites.offer import LocatedGraph
from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeights
from onnx_lora.exporter.writing.graph_writer import GraphPaths, GraphWriter
from onnx_lora.exporter.writing.manifest_entries import check_agreement
from onnx_lora.exporter.writing.weight_files import WeightStore
from onnx_lora.manifest import FORMAT_VERSION, MANIFEST, GraphInfo, Manifest
from onnx_lora.package import Package

__all__ = ["build"]


def build(
    folder: Path,
    loaded: Loaded,
    asked: Points,
    *,
    progress: Progress = lambda *_: None,
) -> Package:
    """Write a package's files into `folder`: graphs, weights, manifest, and copies of the companions.

    Data files in `loaded.scratch` are moved, others copied.

    Raises ModelError: a file is no ONNX graph, nothing in it is targeted, or a name means nothing.
    """
    from onnx_lora import __version__

    places = [GraphPaths(folder, source, several=len(loaded.graphs) > 1) for source in loaded.graphs]
    reserved = [MANIFEST]
    for place in places:
        reserved += [place.points.name, place.base.name]
    store = WeightStore(folder, scratch=loaded.scratch, reserved=reserved)
    graphs: list[LocatedGraph] = []
    for index, source in enumerate(loaded.graphs):
        progress("locate", index, len(loaded.graphs))
        graphs.append(_locate(source, store, loaded))
    offers = agree_on_offers(graphs, asked)
    chosen = choose_modules(offers, asked, loaded.weights)
    infos: list[GraphInfo] = []
    for offer, place in zip(offers, places, strict=True):
        infos.append(GraphWriter(offer, chosen, store, place, asked, progress).write())
    check_agreement(infos, loaded.graphs[0].file)
    manifest = Manifest(FORMAT_VERSION, f"onnx-lora {__version__}", loaded.record, tuple(infos), loaded.untrained)
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    _copy_companions(loaded.companions, folder)
    return Package.open(folder)


def _copy_companions(companions: Sequence[Path], folder: Path) -> None:
    """Copy files and folders that the package does not hold already."""
    for companion in companions:
        target = folder / companion.name
        if target.exists():
            continue
        if companion.is_dir():
            shutil.copytree(companion, target)
        else:
            shutil.copyfile(companion, target)


def _locate(source: GraphFile, store: WeightStore, loaded: Loaded) -> LocatedGraph:
    """Load one graph, and find the places that it has for branches."""
    model = load(source.file)
    # First of all: from here on the weights are in a file, not in memory.
    store.externalize(model.graph)
    with name_step("inferring its shapes", source.file):
        shapes = infer_shapes(model)
    weights = source.weights or loaded.weights
    located, doubt = locate(model.graph, weights), ""
    if source.calls is not None:
        located = drop_miscounted(located, model.graph, source.calls)
    else:
        known = frozenset[str]() if weights is None else weights.names
        traces = find_traces(model, [one.product for one in located.occurrences], known)
        located = note_doubts(located, model.graph, traces, named=weights is None)
        doubt = traces.of_whole_weights()
    if weights is None and loaded.names is not None:
        located = rename(located, loaded.names)
    if source.prefix:
        located = located.under(source.prefix)
    parameters = _name_vectors(model.graph, weights, source, loaded)
    return LocatedGraph(source, model, shapes, find_sites(located, shapes), doubt, parameters)


def _name_vectors(
    graph: ir.Graph, weights: CheckpointWeights | None, source: GraphFile, loaded: Loaded
) -> ParameterNames:
    if weights is not None:
        return name_parameters(graph, weights.vectors, source.calls)
    if loaded.names is not None:
        return name_built_parameters(graph, loaded.names.architecture)
    return ParameterNames()
