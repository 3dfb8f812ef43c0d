"""From ONNX files to a package: the order of the steps, and the manifest at the end.

load –locate, settle→ sites –choose, own→ base graph on disk –inject→ graph with points on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.exporter.axes import Shapes, infer_shapes
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.describe import branches_of, free_modules, points_of, replaceable_of
from onnx_lora.exporter.foreign import foreign
from onnx_lora.exporter.genai_names import GenaiNames
from onnx_lora.exporter.graph_files import GraphFile, Loaded
from onnx_lora.exporter.inject import inject
from onnx_lora.exporter.load import check, load
from onnx_lora.exporter.locate import locate
from onnx_lora.exporter.located import Located, Occurrence, Stray, label_of
from onnx_lora.exporter.options import ALL_LINEAR, Options, Progress
from onnx_lora.exporter.ort_check import check_opens
from onnx_lora.exporter.sites import Site, Sites, settle
from onnx_lora.exporter.surgery import Surgeon
from onnx_lora.exporter.targets import select
from onnx_lora.exporter.traces import find_traces
from onnx_lora.exporter.untie import own_exposures, own_weights
from onnx_lora.exporter.weights import WeightStore
from onnx_lora.exporter.whole_weights import Exposure, Exposures, agreeing, check_names, find_exposures
from onnx_lora.heads import OUTPUT_LAYERS
from onnx_lora.kinds import Linear
from onnx_lora.manifest import FORMAT_VERSION, MANIFEST, GraphInfo, Manifest, Unplaced
from onnx_lora.package import Package
from onnx_lora.points import Branch, InjectionPoint, WholeWeight

__all__ = ["build"]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A loaded graph on its way into the package."""

    source: GraphFile
    model: ir.Model
    shapes: Shapes
    sites: Sites
    doubt: str  # why whole weights may be others than the model's, or nothing


def build(
    folder: Path,
    loaded: Loaded,
    options: Options,
    *,
    progress: Progress = lambda *_: None,
) -> Package:
    """Write a package's files into `folder`: graphs, weights, manifest, and copies of the companions.

    Data files in `loaded.scratch` are moved, others copied.

    Raises ModelError: a file is no ONNX graph, nothing in it is targeted, or a name means nothing.
    """
    from onnx_lora import __version__

    sources, checkpoint, names = loaded.sources, loaded.checkpoint, loaded.names
    files = [_Files(folder, source, several=len(sources) > 1) for source in sources]
    own = [MANIFEST, *(file.name for each in files for file in (each.points, each.base))]
    store = WeightStore(folder, scratch=loaded.scratch, reserved=own)
    graphs: list[_Graph] = []
    for index, source in enumerate(sources):
        progress("locate", index, len(sources))
        graphs.append(_read(source, store, checkpoint, names))
    settled = settle([graph.sites for graph in graphs])
    exposures = agreeing(
        [
            _counted(
                find_exposures(graph.model.graph, sites, options.replaceable, prefix=graph.source.prefix), graph.source
            )
            for graph, sites in zip(graphs, settled, strict=True)
        ]
    )
    chosen = _choose(graphs, settled, exposures, options, checkpoint)
    infos: list[GraphInfo] = []
    for graph, sites, exposed, place in zip(graphs, settled, exposures, files, strict=True):
        write = _Writing(graph, sites, exposed.found, chosen, store, place, options, progress)
        infos.append(write.run())
    manifest = Manifest(
        FORMAT_VERSION, f"onnx-lora {__version__}", loaded.origin, _agreeing(infos, graphs[0].source.file)
    )
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    for companion in loaded.companions:
        if not (folder / companion.name).exists():
            copy: Callable[[Path, Path], object] = shutil.copytree if companion.is_dir() else shutil.copyfile
            copy(companion, folder / companion.name)
    return Package.open(folder)


def _read(source: GraphFile, store: WeightStore, checkpoint: Checkpoint | None, names: GenaiNames | None) -> _Graph:
    model = load(source.file)
    # First of all: from here on the weights are in a file, not in memory.
    store.externalize(model.graph)
    with foreign("inferring its shapes", source.file):
        shapes = infer_shapes(model)
    own = source.checkpoint or checkpoint
    located, doubt = locate(model.graph, own), ""
    if source.calls is not None:
        located = located.counted(model.graph, source.calls)
    else:
        known = frozenset[str]() if own is None else own.names
        traces = find_traces(model, [linear.product for linear in located.linears], known)
        located = located.doubted(model.graph, traces, named=own is None)
        doubt = traces.of_whole_weights()
    if own is None and names is not None:
        located = _renamed(located, names)
    if source.prefix:
        located = located.under(source.prefix)
    return _Graph(source, model, shapes, Sites.of(located, shapes), doubt)


def _counted(exposures: Exposures, source: GraphFile) -> Exposures:
    """The same without whole weights of modules that torch calls otherwise than once, as the graph shows them: another
    call of a norm may have become a constant."""
    if source.calls is None:
        return exposures
    found: list[Exposure] = []
    refused = dict(exposures.refused)
    for exposure in exposures.found:
        module = exposure.name.removeprefix(source.prefix).rpartition(".")[0]
        called = source.calls.counts.get(module, 0)
        if exposure.site is None and called != 1:
            refused[exposure.name] = f"torch calls {module} {called} times, and the graph uses the weight once"
        else:
            found.append(exposure)
    return Exposures(tuple(found), refused)


def _renamed(located: Located, names: GenaiNames) -> Located:
    linears: list[Occurrence] = []
    strays = list(located.strays)
    for linear in located.linears:
        modules = names.modules(linear)
        if isinstance(modules, str):
            strays.append(Stray(label_of(linear.node), modules, (linear.module,)))
        else:
            linears.extend(modules)
    return Located(tuple(linears), tuple(strays))


def _choose(
    graphs: Sequence[_Graph],
    settled: Sequence[Sites],
    exposures: Sequence[Exposures],
    options: Options,
    checkpoint: Checkpoint | None,
) -> frozenset[str]:
    """The modules that get points. Raises ModelError: none can, of those that are asked for."""
    modules = list(dict.fromkeys(name for sites in settled for site in sites.sites for name in site.modules))
    before = dict.fromkeys(name for graph in graphs for site in graph.sites.sites for name in site.modules)
    strays = [stray for sites in settled for stray in sites.strays]
    if not modules:
        raise _nothing("an injection point needs a node with a weight (MatMul, Gemm, Conv, Gather)", graphs, strays)
    check_names(options.replaceable, exposures, modules)
    heads = OUTPUT_LAYERS if checkpoint is None or checkpoint.heads is None else checkpoint.heads
    linears = [linear for graph in graphs for site in graph.sites.sites for linear in site.linears]
    others = {linear.module for linear in linears if not isinstance(linear.product.kind, Linear)}
    wanted = select(list(before), options.targets, heads=heads, others=others)
    exposed = {found.linear.module for graph in exposures for found in graph.found if found.linear is not None}
    if options.targets in (ALL_LINEAR, (ALL_LINEAR,)):
        wanted -= exposed  # as PEFT leaves out what modules_to_save holds
    chosen = wanted & set(modules)
    if not chosen and not exposed:
        raise _nothing(f"of targets {options.targets!r} one at least must get a point", graphs, strays)
    return chosen


def _nothing(must: str, graphs: Sequence[_Graph], strays: Sequence[Stray]) -> ModelError:
    problems = [f"{stray.node}: {stray.reason}" for stray in strays]
    return ModelError(
        f"{must}, and none could be placed",
        path=graphs[0].source.file,
        problems=problems or ["the graph has no such node with a constant weight"],
    )


def _agreeing(infos: Sequence[GraphInfo], path: Path) -> tuple[GraphInfo, ...]:
    """Raises ModelError: two graphs mean different weights by one replaceable name."""
    known: dict[str, WholeWeight] = {}
    for weight in (weight for info in infos for weight in info.replaceable):
        first = known.setdefault(weight.name, weight)
        if (first.role, first.shape, first.dtype, first.sha256) != (
            *(weight.role, weight.shape, weight.dtype, weight.sha256),
        ):
            raise ModelError(
                f"{weight.name} is another weight in another graph; attach the files one by one", path=path
            )
    return tuple(infos)


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
class _Writing:
    """Writes one graph's base and its graph with points."""

    graph: _Graph
    settled: Sites
    exposures: tuple[Exposure, ...]
    chosen: frozenset[str]
    store: WeightStore
    files: _Files
    options: Options
    progress: Progress

    def run(self) -> GraphInfo:
        model = self.graph.model
        surgeon = Surgeon(model)
        exposed = {exposure.site.node for exposure in self.exposures if exposure.site is not None}
        # Where one packed module is chosen, its neighbours come along.
        wanted = [site for site in self.settled.sites if site.node in exposed or self.chosen & set(site.modules)]
        sites = own_weights(surgeon, wanted)
        exposures = own_exposures(surgeon, self.exposures, sites)
        operands = [operand for site in sites for product in site.products for operand in product.operands]
        owned = {operand.value.name or "" for operand in operands}
        self.store.externalize(model.graph, owned | {exposure.value.name or "" for exposure in exposures})
        self._save(self.files.base)
        given = [site for site in sites if self.chosen & set(site.modules)]
        points, branches = points_of(given), branches_of(given, dora=self.options.dora)
        heads, pointed = free_modules(model, exposures), {point.module for point in points}
        replaceable = [replaceable_of(exposure, heads, pointed, self.graph.doubt) for exposure in exposures]
        self._inject(surgeon, sites, points, branches, replaceable, exposures)
        self.store.externalize(model.graph)  # the defaults of large replaceable weights
        self._save(self.files.points)
        # Both graphs hold the same nodes, so what the base could get wrong shows here too.
        check(self.files.points, self.graph.source.file)
        check_opens(self.files.points, self.graph.source.file)
        modules = dict.fromkeys(module for site in self.settled.sites for module in site.modules)
        return GraphInfo(
            name=self.graph.source.name,
            file=self.files.points.name,
            base_file=self.files.base.name,
            points=points,
            branches=branches,
            replaceable=tuple(replaceable),
            untargeted=tuple(module for module in modules if module not in pointed),
            unplaced=tuple(Unplaced(stray.node, stray.reason) for stray in self.settled.strays),
        )

    def _save(self, file: Path) -> None:
        with foreign("writing it again", self.graph.source.file):
            ir.save(self.graph.model, file)

    def _inject(
        self,
        surgeon: Surgeon,
        sites: Sequence[Site],
        points: Sequence[InjectionPoint],
        branches: Sequence[Branch],
        replaceable: Sequence[WholeWeight],
        exposures: Sequence[Exposure],
    ) -> None:
        by_module = {point.module: point for point in points}
        inputs: dict[str, ir.Value] = {}
        for branch in branches:
            own = [by_module[module] for module in branch.modules]
            rank, dtype, outputs = self.options.default_rank, np.dtype(own[0].dtype), sum(p.out_features for p in own)
            rows, symbol = f"{branch.name}.rows", f"{branch.name}.rank"
            inputs[branch.lora_a] = surgeon.optional_input(
                branch.lora_a, [rows, own[0].in_features, symbol], np.zeros((1, own[0].in_features, rank), dtype)
            )
            inputs[branch.lora_b] = surgeon.optional_input(
                branch.lora_b, [rows, symbol, outputs], np.zeros((1, rank, outputs), dtype)
            )
            if branch.dora:
                inputs[branch.dora_scale] = surgeon.optional_input(
                    branch.dora_scale, [f"{branch.name}.dora_rows", 1, outputs], np.ones((1, 1, outputs), dtype)
                )
        for weight, exposure in zip(replaceable, exposures, strict=True):
            inputs[weight.name] = _expose(surgeon, weight, exposure)
        by_modules = {branch.modules: branch for branch in branches}
        replaced: dict[str, dict[str, WholeWeight]] = {}
        for weight in (weight for weight in replaceable if weight.has_rows):
            replaced.setdefault(weight.module, {})[weight.name] = weight
        for index, site in enumerate(sites):
            self.progress(f"points of {self.graph.source.name}", index, len(sites))
            own_replaced: dict[str, WholeWeight] = {}
            for module in site.modules:
                own_replaced.update(replaced.get(module, {}))
            inject(surgeon, site, self.graph.shapes, inputs, by_modules.get(site.modules), own_replaced)
        unused = [name for name, value in inputs.items() if not value.uses()]
        assert not unused, f"adapter inputs that nothing reads: {unused}"


def _expose(surgeon: Surgeon, weight: WholeWeight, exposure: Exposure) -> ir.Value:
    """The optional input of a replaceable weight; a whole one takes its initializer's place at once."""
    assert exposure.value.const_value is not None
    stored = exposure.value.const_value.numpy().astype(weight.dtype, copy=False)
    default = weight.from_initializer(stored, weight.parts[0])
    symbols: list[int | str] = list(default.shape)
    if weight.has_rows:
        symbols[0] = f"{weight.name}.rows"
    if None in weight.free_graph_shape:
        symbols[weight.free_graph_shape.index(None)] = f"{weight.module}.outputs"
    if surgeon.graph.initializers.get(weight.name) is not None:
        surgeon.free_name(surgeon.graph.initializers[weight.name])
    value = surgeon.optional_input(weight.name, symbols, np.ascontiguousarray(default))
    if not weight.has_rows:
        surgeon.replace(exposure.value, value)
        value.shape = ir.Shape(symbols)  # a table's length is free
        if exposure.value.name in surgeon.graph.initializers:
            surgeon.free_name(exposure.value)
    return value
