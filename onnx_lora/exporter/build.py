"""From ONNX files to a package: the order of the steps, and the manifest at the end.

load –locate→ linear nodes –choose→ sites –own→ base graph on disk –infer, inject→ graph with points on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.serde import SerdeError

from onnx_lora.errors import ModelError
from onnx_lora.exporter.axes import Shapes, infer_shapes
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.describe import free_modules, points_of, replaceable_of
from onnx_lora.exporter.expose import HEADS_ONLY, Exposure, check_names, find_exposures
from onnx_lora.exporter.inject import Placement, Site, inject
from onnx_lora.exporter.load import check, load
from onnx_lora.exporter.locate import Linear, Located, locate
from onnx_lora.exporter.own import own_exposures, own_weights
from onnx_lora.exporter.surgery import Surgeon
from onnx_lora.exporter.targets import ALL_LINEAR, HEADS, select
from onnx_lora.exporter.weights import WeightStore
from onnx_lora.package import FORMAT_VERSION, MANIFEST, GraphInfo, Manifest, Package, Unplaced
from onnx_lora.points import InjectionPoint, Replaceable

__all__ = ["Options", "Progress", "Source", "build"]

# Called with what is being done, and how much of it is done: ("points", 12, 210).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Source:
    """One ONNX file to be given points, and its name in the package."""

    name: str
    file: Path


@dataclass(frozen=True, slots=True)
class Options:
    """What gets points. `default_rank`: 1 where an execution provider cannot run rank 0."""

    targets: str | tuple[str, ...] = ALL_LINEAR
    replaceable: str | tuple[str, ...] = HEADS_ONLY
    default_rank: int = 0

    @staticmethod
    def of(targets: str | Iterable[str], replaceable: str | Iterable[str], default_rank: int) -> Options:
        """Raises ModelError: `default_rank` is neither 0 nor 1."""
        return Options(
            targets if isinstance(targets, str) else tuple(targets),
            replaceable if isinstance(replaceable, str) else tuple(replaceable),
            default_rank,
        )

    def __post_init__(self) -> None:
        if self.default_rank not in (0, 1):
            raise ModelError(f"default_rank must be 0 or 1, and is {self.default_rank!r}")


@dataclass(frozen=True, slots=True)
class _Graph:
    """A loaded graph on its way into the package."""

    source: Source
    model: ir.Model
    located: Located
    exposures: tuple[Exposure, ...]


def build(
    folder: Path,
    sources: Sequence[Source],
    *,
    options: Options,
    checkpoint: Checkpoint | None,
    origin: dict[str, str],
    companions: Iterable[Path] = (),
    scratch: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Package:
    """Write a package's files into `folder`: graphs, weights, manifest, and copies of `companions`.

    Data files in `scratch` are moved, others copied.

    Raises ModelError: a file is no ONNX graph, nothing in it is targeted, or a name means nothing.
    """
    from onnx_lora import __version__

    graphs: list[_Graph] = []
    used: frozenset[str] = frozenset()
    for index, source in enumerate(sources):
        progress("locate", index, len(sources))
        model = load(source.file)
        located = _consistent(locate(model.graph, checkpoint))
        exposures, names = find_exposures(model.graph, located.linears, options.replaceable)
        used |= names
        graphs.append(_Graph(source, model, located, exposures))
    modules = list(dict.fromkeys(module for graph in graphs for module in graph.located.modules))
    if not modules:
        raise _nothing_found(graphs)
    check_names(options.replaceable, used, modules)
    chosen = _choose(modules, graphs, options, checkpoint)
    store = WeightStore(folder, scratch=scratch)
    infos: list[GraphInfo] = []
    for graph in graphs:
        try:
            infos.append(_write(graph, chosen, store, folder, options, len(graphs) > 1, progress))
        except SerdeError as error:
            raise ModelError(f"must be valid ONNX: {error.__cause__ or error}", path=graph.source.file) from error
    manifest = Manifest(FORMAT_VERSION, f"onnx-lora {__version__}", origin, tuple(infos))
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    for companion in companions:
        if not (folder / companion.name).exists():
            shutil.copyfile(companion, folder / companion.name)
    return Package.open(folder)


def _consistent(located: Located) -> Located:
    """Take out modules whose nodes do not hold one and the same weight: a name shared by accident."""
    identity: dict[str, tuple[object, ...]] = {}
    clashing: set[str] = set()
    for linear in located.linears:
        same = linear.in_features, linear.out_features, linear.start
        known = identity.setdefault(linear.module, (linear, *same))
        first = known[0]
        assert isinstance(first, Linear)
        if known[1:] != same or not (first.weight is linear.weight or np.array_equal(first.values(), linear.values())):
            clashing.add(linear.module)
    return Located(
        tuple(linear for linear in located.linears if linear.module not in clashing),
        (*located.unplaced, *(Unplaced(module, "its nodes hold different weights") for module in sorted(clashing))),
    )


def _nothing_found(graphs: Sequence[_Graph]) -> ModelError:
    problems = [f"{entry.node}: {entry.reason}" for graph in graphs for entry in graph.located.unplaced]
    return ModelError(
        "an injection point needs a linear node (MatMul or Gemm with a weight), and none could be placed",
        path=graphs[0].source.file,
        problems=problems[:20] or ["the graph has no MatMul or Gemm with a constant weight"],
    )


def _choose(
    modules: Sequence[str], graphs: Sequence[_Graph], options: Options, checkpoint: Checkpoint | None
) -> frozenset[str]:
    heads = HEADS if checkpoint is None or checkpoint.heads is None else checkpoint.heads
    chosen = select(modules, options.targets, heads=heads)
    if options.targets == ALL_LINEAR:
        # As PEFT leaves out what modules_to_save holds.
        replaced = {exposure.linear.module for graph in graphs for exposure in graph.exposures if exposure.linear}
        chosen -= replaced
    return chosen


def _sites(located: Located, chosen: frozenset[str], exposed: frozenset[str]) -> list[Site]:
    """The nodes to work on. Where one packed module is chosen, its neighbours come along."""
    by_node: dict[ir.Node, list[Linear]] = {}
    for linear in located.linears:
        by_node.setdefault(linear.node, []).append(linear)
    return [
        Site(tuple(sorted(linears, key=lambda linear: linear.start)))
        for linears in by_node.values()
        if any(linear.module in chosen or linear.module in exposed for linear in linears)
    ]


def _write(
    graph: _Graph,
    chosen: frozenset[str],
    store: WeightStore,
    folder: Path,
    options: Options,
    several: bool,
    progress: Progress,
) -> GraphInfo:
    """Write one graph's base and its graph with points."""
    surgeon = Surgeon(graph.model)
    exposed = frozenset(exposure.linear.module for exposure in graph.exposures if exposure.linear is not None)
    sites = own_weights(surgeon, _sites(graph.located, chosen, exposed))
    linears = [linear for site in sites for linear in site.linears]
    exposures = own_exposures(surgeon, graph.exposures, linears)
    owned = {linear.weight.name or "" for linear in linears} | {exposure.value.name or "" for exposure in exposures}
    store.externalize(graph.model.graph, owned)
    file = f"{graph.source.name}.onnx"
    base_file = f"base.{graph.source.name}.onnx" if several else "base.onnx"
    ir.save(graph.model, folder / base_file)
    shapes = infer_shapes(graph.model)
    sites, unplaced = _placeable(sites, shapes)
    pointed = [site for site in sites if any(linear.module in chosen for linear in site.linears)]
    points = points_of(pointed, shapes)
    free = free_modules(graph.model, exposures)
    replaceable = tuple(replaceable_of(exposure, linears, shapes, free) for exposure in exposures)
    _inject_all(surgeon, graph.source.name, sites, shapes, points, replaceable, exposures, options, progress)
    ir.save(graph.model, folder / file)
    check(folder / file)
    placed = {point.module for point in points}
    return GraphInfo(
        name=graph.source.name,
        file=file,
        base_file=base_file,
        points=points,
        replaceable=replaceable,
        untargeted=tuple(module for module in graph.located.modules if module not in placed),
        unplaced=(*graph.located.unplaced, *unplaced),
    )


def _placeable(sites: Sequence[Site], shapes: Shapes) -> tuple[list[Site], list[Unplaced]]:
    """Sites whose input has a known number of axes, at least two."""
    good: list[Site] = []
    bad: list[Unplaced] = []
    lost: set[str] = set()
    for site in sites:
        rank = shapes.rank(site.input) if site.node.op_type == "MatMul" else 2
        if rank is None or rank < 2:
            lost.update(linear.module for linear in site.linears)
            found = "cannot be inferred" if rank is None else f"is {rank}"
            bad.append(Unplaced(site.node.name or site.linears[0].module, f"the rank of its input {found}"))
        else:
            good.append(site)
    # A module used by several nodes gets its point at all of them, or at none.
    return [site for site in good if lost.isdisjoint(linear.module for linear in site.linears)], bad


def _inject_all(
    surgeon: Surgeon,
    label: str,
    sites: Sequence[Site],
    shapes: Shapes,
    points: Sequence[InjectionPoint],
    replaceable: Sequence[Replaceable],
    exposures: Sequence[Exposure],
    options: Options,
    progress: Progress,
) -> None:
    inputs: dict[str, ir.Value] = {}
    for point in points:
        rank, dtype = options.default_rank, np.dtype(point.dtype)
        rows, symbol = f"{point.module}.rows", f"{point.module}.rank"
        inputs[point.lora_a] = surgeon.optional_input(
            point.lora_a, [rows, point.in_features, symbol], np.zeros((1, point.in_features, rank), dtype)
        )
        inputs[point.lora_b] = surgeon.optional_input(
            point.lora_b, [rows, symbol, point.out_features], np.zeros((1, rank, point.out_features), dtype)
        )
    by_module = {point.module: point for point in points}
    for weight, exposure in zip(replaceable, exposures, strict=True):
        inputs[weight.name] = _expose(surgeon, weight, exposure)
    placements = [Placement.of(site, shapes) for site in sites]
    for index, (site, placement) in enumerate(zip(sites, placements, strict=True)):
        progress(f"points of {label}", index, len(sites))
        modules = {linear.module for linear in site.linears}
        inject(
            surgeon,
            site,
            placement,
            shapes,
            inputs,
            {module: by_module[module] for module in modules if module in by_module},
            {weight.name: weight for weight in replaceable if weight.role != "whole" and weight.module in modules},
        )


def _expose(surgeon: Surgeon, weight: Replaceable, exposure: Exposure) -> ir.Value:
    """The optional input of a replaceable weight; a whole one takes its initializer's place at once."""
    assert exposure.value.const_value is not None
    default = weight.from_initializer(exposure.value.const_value.numpy(), weight.parts[0])
    symbols: list[int | str] = list(default.shape)
    if weight.role != "whole":
        symbols[0] = f"{weight.name}.rows"
        if weight.free_outputs:
            symbols[-1] = f"{weight.module}.outputs"
    if surgeon.graph.initializers.get(weight.name) is not None:
        surgeon.free_name(surgeon.graph.initializers[weight.name])
    value = surgeon.optional_input(weight.name, symbols, np.ascontiguousarray(default))
    if weight.role == "whole":
        surgeon.replace(exposure.value, value)
        if exposure.value.name in surgeon.graph.initializers:
            surgeon.free_name(exposure.value)
    return value
