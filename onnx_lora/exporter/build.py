"""From ONNX files to a package: the order of the steps, and the manifest at the end.

load –locate, settle→ sites –choose, untie→ base graph on disk –inject→ graph with points on disk."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.exporter.foreign_libraries import name_step
from onnx_lora.exporter.frontends.source import Loaded
from onnx_lora.exporter.graph.axes import Shapes, infer_shapes
from onnx_lora.exporter.intake.load import check, load
from onnx_lora.exporter.locating.doubts import drop_miscounted, note_doubts
from onnx_lora.exporter.locating.genai_names import rename
from onnx_lora.exporter.locating.locate import locate
from onnx_lora.exporter.locating.traces import find_traces
from onnx_lora.exporter.ort_check import check_opens
from onnx_lora.exporter.request import GraphFile, Points, Progress
from onnx_lora.exporter.sites.find_sites import find_sites, settle
from onnx_lora.exporter.sites.free_outputs import find_free_modules
from onnx_lora.exporter.sites.site import Site, Sites, WholeWeightSite, WholeWeightSites
from onnx_lora.exporter.sites.targets import ALL_LINEAR, select
from onnx_lora.exporter.sites.whole_weights import (
    check_names,
    drop_miscounted_weights,
    find_whole_weights,
    keep_agreeing,
)
from onnx_lora.exporter.surgery.inject import inject
from onnx_lora.exporter.surgery.surgeon import Surgeon
from onnx_lora.exporter.surgery.untie import untie_weights, untie_whole_weights
from onnx_lora.exporter.weights.checkpoint_weights import CheckpointWeights
from onnx_lora.exporter.writing.manifest_entries import (
    check_agreement,
    describe_branches,
    describe_points,
    describe_unplaced,
    describe_whole_weight,
)
from onnx_lora.exporter.writing.weight_files import WeightStore
from onnx_lora.heads import OUTPUT_LAYERS
from onnx_lora.manifest import FORMAT_VERSION, MANIFEST, GraphInfo, Manifest
from onnx_lora.package import Package
from onnx_lora.points import Branch, InjectionPoint, WholeWeight

__all__ = ["build"]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A loaded graph on its way into the package. `doubt`: why whole weights may be others than the model's, or
    nothing."""

    source: GraphFile
    model: ir.Model
    shapes: Shapes
    sites: Sites
    doubt: str


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a graph can take, once all graphs of the package agree: places for branches, and whole weights."""

    sites: Sites
    whole_weights: WholeWeightSites


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

    places = [_Files(folder, source, several=len(loaded.graphs) > 1) for source in loaded.graphs]
    reserved = [MANIFEST]
    for place in places:
        reserved += [place.points.name, place.base.name]
    store = WeightStore(folder, scratch=loaded.scratch, reserved=reserved)
    graphs: list[_Graph] = []
    for index, source in enumerate(loaded.graphs):
        progress("locate", index, len(loaded.graphs))
        graphs.append(_read(source, store, loaded))
    offers = _agree(graphs, asked)
    chosen = _choose(graphs, offers, asked, loaded.weights)
    infos: list[GraphInfo] = []
    for graph, offer, place in zip(graphs, offers, places, strict=True):
        infos.append(_Writing(graph, offer, chosen, store, place, asked, progress).run())
    check_agreement(infos, loaded.graphs[0].file)
    manifest = Manifest(FORMAT_VERSION, f"onnx-lora {__version__}", loaded.record, tuple(infos))
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


def _read(source: GraphFile, store: WeightStore, loaded: Loaded) -> _Graph:
    """Load one graph, and find what it offers."""
    model = load(source.file)
    # First of all: from here on the weights are in a file, not in memory.
    store.externalize(model.graph)
    with name_step("inferring its shapes", source.file):
        shapes = infer_shapes(model)
    checkpoint = source.checkpoint or loaded.weights
    located, doubt = locate(model.graph, checkpoint), ""
    if source.calls is not None:
        located = drop_miscounted(located, model.graph, source.calls)
    else:
        known = frozenset[str]() if checkpoint is None else checkpoint.names
        traces = find_traces(model, [one.product for one in located.occurrences], known)
        located = note_doubts(located, model.graph, traces, named=checkpoint is None)
        doubt = traces.of_whole_weights()
    if checkpoint is None and loaded.names is not None:
        located = rename(located, loaded.names)
    if source.prefix:
        located = located.under(source.prefix)
    return _Graph(source, model, shapes, find_sites(located, shapes), doubt)


def _agree(graphs: Sequence[_Graph], asked: Points) -> list[_Offer]:
    """What each graph offers of what none of the others refuses."""
    settled = settle([graph.sites for graph in graphs])
    weights: list[WholeWeightSites] = []
    for graph, sites in zip(graphs, settled, strict=True):
        source = graph.source
        found = find_whole_weights(graph.model.graph, sites, asked.replaceable, prefix=source.prefix)
        if source.calls is not None:
            found = drop_miscounted_weights(found, source.calls, prefix=source.prefix)
        weights.append(found)
    return [_Offer(*offer) for offer in zip(settled, keep_agreeing(weights), strict=True)]


def _choose(
    graphs: Sequence[_Graph], offers: Sequence[_Offer], asked: Points, checkpoint: CheckpointWeights | None
) -> frozenset[str]:
    """The modules that get points. Raises ModelError: none can, of those that are asked for."""
    modules = _modules_of(offer.sites for offer in offers)
    if not modules:
        must = "an injection point needs a node with a weight (MatMul, Gemm, Conv, Gather)"
        raise _nothing_placed(must, graphs, offers)
    check_names(asked.replaceable, [offer.whole_weights for offer in offers], list(modules))
    replaced: set[str] = set()
    for offer in offers:
        for weight in offer.whole_weights.found:
            if weight.occurrence is not None:
                replaced.add(weight.occurrence.module)
    heads = OUTPUT_LAYERS if checkpoint is None or checkpoint.heads is None else checkpoint.heads
    found = [graph.sites for graph in graphs]
    wanted = select(list(_modules_of(found)), asked.targets, heads=heads, others=_other_than_linear(found))
    if asked.targets in (ALL_LINEAR, (ALL_LINEAR,)):
        wanted -= replaced  # as PEFT leaves out what modules_to_save holds
    chosen = wanted.intersection(modules)
    if not chosen and not replaced:
        must = f"of targets {asked.targets!r} one at least must get a point"
        raise _nothing_placed(must, graphs, offers)
    return chosen


def _modules_of(graphs: Iterable[Sites]) -> tuple[str, ...]:
    """The modules of several graphs, in their order."""
    modules: dict[str, None] = {}
    for sites in graphs:
        modules.update(dict.fromkeys(sites.modules))
    return tuple(modules)


def _other_than_linear(graphs: Sequence[Sites]) -> set[str]:
    """The modules that "all-linear" does not mean."""
    others: set[str] = set()
    for sites in graphs:
        for one in sites.occurrences:
            if not one.graph_kind.is_linear:
                others.add(one.module)
    return others


def _nothing_placed(must: str, graphs: Sequence[_Graph], offers: Sequence[_Offer]) -> ModelError:
    problems: list[str] = []
    for offer in offers:
        problems += [f"{node.node}: {node.reason}" for node in offer.sites.unplaced]
    if not problems:
        problems = ["the graph has no such node with a constant weight"]
    return ModelError(f"{must}, and none could be placed", path=graphs[0].source.file, problems=problems)


@dataclass(frozen=True, slots=True)
class _Files:
    """Where one graph is written, with points and without."""

    folder: Path
    source: GraphFile
    several: bool

    @property
    def points(self) -> Path:
        return self.folder / f"{self.source.name}.onnx"

    @property
    def base(self) -> Path:
        return self.folder / (f"base.{self.source.name}.onnx" if self.several else "base.onnx")


@dataclass(frozen=True, slots=True)
class _Entries:
    """What the manifest says of one graph's places. `whole_weights` are in the order of their sites."""

    points: tuple[InjectionPoint, ...]
    branches: tuple[Branch, ...]
    whole_weights: tuple[WholeWeight, ...]


@dataclass(frozen=True, slots=True)
class _Writing:
    """Writes one graph's base and its graph with points."""

    graph: _Graph
    offer: _Offer
    chosen: Collection[str]
    store: WeightStore
    files: _Files
    asked: Points
    progress: Progress

    def run(self) -> GraphInfo:
        model, source = self.graph.model, self.graph.source
        surgeon = Surgeon(model)
        sites = untie_weights(surgeon, self._wanted_sites())
        weights = untie_whole_weights(surgeon, self.offer.whole_weights.found, sites)
        self.store.externalize(model.graph, _names_of(sites, weights))
        self._save(self.files.base)
        entries = self._describe(sites, weights)
        inputs = self._add_inputs(surgeon, entries, weights)
        self._inject(surgeon, sites, entries, inputs)
        self.store.externalize(model.graph)  # the defaults of large whole weights
        self._save(self.files.points)
        # Both graphs hold the same nodes, so what the base could get wrong shows here too.
        check(self.files.points, source.file)
        check_opens(self.files.points, source.file)
        pointed = {point.module for point in entries.points}
        return GraphInfo(
            name=source.name,
            file=self.files.points.name,
            base_file=self.files.base.name,
            points=entries.points,
            branches=entries.branches,
            replaceable=entries.whole_weights,
            untargeted=tuple(module for module in self.offer.sites.modules if module not in pointed),
            unplaced=describe_unplaced(self.offer.sites.unplaced),
        )

    def _wanted_sites(self) -> list[Site]:
        """The places that change: those of chosen modules, whose neighbours in a packed product come along, and those
        whose weight may be replaced."""
        replaced = {weight.site.node for weight in self.offer.whole_weights.found if weight.site is not None}
        return [site for site in self.offer.sites.sites if site.node in replaced or self._is_chosen(site)]

    def _is_chosen(self, site: Site) -> bool:
        return any(module in self.chosen for module in site.modules)

    def _save(self, file: Path) -> None:
        with name_step("writing it again", self.graph.source.file):
            ir.save(self.graph.model, file)

    def _describe(self, sites: Sequence[Site], weights: Sequence[WholeWeightSite]) -> _Entries:
        chosen = [site for site in sites if self._is_chosen(site)]
        points = describe_points(chosen)
        pointed = {point.module for point in points}
        heads = find_free_modules(self.graph.model, weights)
        whole_weights = [describe_whole_weight(weight, heads, pointed, self.graph.doubt) for weight in weights]
        return _Entries(points, describe_branches(chosen, dora=self.asked.dora), tuple(whole_weights))

    def _add_inputs(
        self, surgeon: Surgeon, entries: _Entries, weights: Sequence[WholeWeightSite]
    ) -> dict[str, ir.Value]:
        """The optional inputs through which adapters enter, by name."""
        by_module = {point.module: point for point in entries.points}
        inputs: dict[str, ir.Value] = {}
        for branch in entries.branches:
            points = [by_module[module] for module in branch.modules]
            inputs.update(_add_branch_inputs(surgeon, branch, points, self.asked.default_rank))
        for weight, site in zip(entries.whole_weights, weights, strict=True):
            inputs[weight.name] = _expose(surgeon, weight, site)
        return inputs

    def _inject(
        self, surgeon: Surgeon, sites: Sequence[Site], entries: _Entries, inputs: Mapping[str, ir.Value]
    ) -> None:
        by_modules = {branch.modules: branch for branch in entries.branches}
        replaced: dict[str, dict[str, WholeWeight]] = {}
        for weight in entries.whole_weights:
            if weight.has_rows:
                replaced.setdefault(weight.module, {})[weight.name] = weight
        for index, site in enumerate(sites):
            self.progress(f"points of {self.graph.source.name}", index, len(sites))
            own: dict[str, WholeWeight] = {}
            for module in site.modules:
                own.update(replaced.get(module, {}))
            inject(surgeon, site, self.graph.shapes, inputs, by_modules.get(site.modules), own)
        unused = [name for name, value in inputs.items() if not value.uses()]
        assert not unused, f"adapter inputs that nothing reads: {unused}"


def _names_of(sites: Sequence[Site], weights: Sequence[WholeWeightSite]) -> set[str]:
    """The initializers that may be folded into or replaced: they lie in files, however small they are."""
    names = {weight.value.name or "" for weight in weights}
    for site in sites:
        for product in site.products:
            names.update(operand.value.name or "" for operand in product.operands)
    return names


def _add_branch_inputs(
    surgeon: Surgeon, branch: Branch, points: Sequence[InjectionPoint], rank: int
) -> dict[str, ir.Value]:
    """A branch's factors, zeros of the default rank, and its scale, ones."""
    dtype = np.dtype(points[0].dtype)
    features, outputs = points[0].in_features, sum(point.out_features for point in points)
    rows, symbol = f"{branch.name}.rows", f"{branch.name}.rank"
    inputs: dict[str, ir.Value] = {}
    inputs[branch.lora_a] = surgeon.optional_input(
        branch.lora_a, [rows, features, symbol], np.zeros((1, features, rank), dtype)
    )
    inputs[branch.lora_b] = surgeon.optional_input(
        branch.lora_b, [rows, symbol, outputs], np.zeros((1, rank, outputs), dtype)
    )
    if branch.dora:
        inputs[branch.dora_scale] = surgeon.optional_input(
            branch.dora_scale, [f"{branch.name}.dora_rows", 1, outputs], np.ones((1, 1, outputs), dtype)
        )
    return inputs


def _expose(surgeon: Surgeon, weight: WholeWeight, site: WholeWeightSite) -> ir.Value:
    """The optional input of a whole weight; where no branch computes with it, it takes its initializer's place at
    once."""
    assert site.value.const_value is not None
    stored = site.value.const_value.numpy().astype(weight.dtype, copy=False)
    default = weight.from_initializer(stored, weight.parts[0])
    symbols: list[int | str] = list(default.shape)
    if weight.has_rows:
        symbols[0] = f"{weight.name}.rows"
    if None in weight.free_graph_shape:
        symbols[weight.free_graph_shape.index(None)] = f"{weight.module}.outputs"
    taken = surgeon.graph.initializers.get(weight.name)
    if taken is not None:
        surgeon.free_name(taken)
    value = surgeon.optional_input(weight.name, symbols, np.ascontiguousarray(default))
    if not weight.has_rows:
        surgeon.replace(site.value, value)
        value.shape = ir.Shape(symbols)  # a table's length is free
        if site.value.name in surgeon.graph.initializers:
            surgeon.free_name(site.value)
    return value
