"""Writes one graph into the package's folder: its base, with every weight untied, and the same graph with points."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.foreign_libraries import name_step
from onnx_lora.exporter.intake.load import check
from onnx_lora.exporter.ort_check import check_opens
from onnx_lora.exporter.request import GraphFile, Points, Progress
from onnx_lora.exporter.sites.free_outputs import find_free_modules
from onnx_lora.exporter.sites.offer import Offer
from onnx_lora.exporter.sites.site import Site, WholeWeightSite
from onnx_lora.exporter.surgery.inject import inject
from onnx_lora.exporter.surgery.surgeon import Surgeon
from onnx_lora.exporter.surgery.untie import untie_weights, untie_whole_weights
from onnx_lora.exporter.writing.manifest_entries import (
    describe_branches,
    describe_points,
    describe_tables,
    describe_unplaced,
    describe_whole_weight,
)
from onnx_lora.exporter.writing.weight_files import WeightStore
from onnx_lora.manifest import GraphInfo
from onnx_lora.points import Branch, InjectionPoint, WholeWeight

__all__ = ["GraphPaths", "GraphWriter"]


@dataclass(frozen=True, slots=True)
class GraphPaths:
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
class GraphWriter:
    """Writes one graph of a package, in the order of `write`'s steps.

    `offer`: what the graph can take; `chosen`: the modules that get points. `store` keeps the weights of all graphs.
    """

    offer: Offer
    chosen: Collection[str]
    store: WeightStore
    files: GraphPaths
    asked: Points
    progress: Progress

    def write(self) -> GraphInfo:
        """Write both files, and say what the manifest says of them.

        Raises ModelError: the graph cannot take a branch, or what was made of it is no sound graph.
        """
        model, source = self.offer.graph.model, self.offer.graph.source
        tables = describe_tables(self.offer.sites.occurrences, self.chosen)
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
            tables=tables,
        )

    def _wanted_sites(self) -> list[Site]:
        """The places that change: those of chosen modules, whose neighbours in a packed product come along, and those
        whose weight may be replaced."""
        replaced: set[ir.Node] = set()
        for weight in self.offer.whole_weights.found:
            if weight.site is not None:
                replaced.add(weight.site.node)
        wanted: list[Site] = []
        for site in self.offer.sites.sites:
            if site.node in replaced or self._is_chosen(site):
                wanted.append(site)
        return wanted

    def _is_chosen(self, site: Site) -> bool:
        return any(module in self.chosen for module in site.modules)

    def _save(self, file: Path) -> None:
        with name_step("writing it again", self.offer.graph.source.file):
            ir.save(self.offer.graph.model, file)

    def _describe(self, sites: Sequence[Site], weights: Sequence[WholeWeightSite]) -> _Entries:
        chosen = [site for site in sites if self._is_chosen(site)]
        points = describe_points(chosen)
        pointed = {point.module for point in points}
        branches = describe_branches(chosen, dora=self.asked.dora)
        heads = find_free_modules(self.offer.graph.model, weights)
        whole_weights: list[WholeWeight] = []
        for weight in weights:
            whole_weights.append(describe_whole_weight(weight, heads, pointed, self.offer.graph.doubt))
        return _Entries(points, branches, tuple(whole_weights))

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
            self.progress(f"points of {self.offer.graph.source.name}", index, len(sites))
            branch = by_modules.get(site.modules)
            own: dict[str, WholeWeight] = {}
            for module in site.modules:
                own.update(replaced.get(module, {}))
            inject(surgeon, site, self.offer.graph.shapes, inputs, branch, own)
        unused = [name for name, value in inputs.items() if not value.uses()]
        assert not unused, f"adapter inputs that nothing reads: {unused}"


def _names_of(sites: Sequence[Site], weights: Sequence[WholeWeightSite]) -> set[str]:
    """The initializers that adapters may be folded into, or may replace: they lie in files, however small they are."""
    names = {weight.value.name or "" for weight in weights}
    for site in sites:
        for product in site.products:
            names.update(operand.value.name or "" for operand in product.operands)
    return names


def _add_branch_inputs(
    surgeon: Surgeon, branch: Branch, points: Sequence[InjectionPoint], rank: int
) -> dict[str, ir.Value]:
    """A branch's factors, whose defaults are zeros of the default `rank`, and its scale, whose default is ones."""
    dtype = np.dtype(points[0].dtype)
    features = points[0].in_features
    outputs = sum(point.out_features for point in points)
    # Symbols of the branch's own: ONNX Runtime's memory planner fails on shared ones.
    rows = f"{branch.name}.rows"
    rank_symbol = f"{branch.name}.rank"
    inputs: dict[str, ir.Value] = {}
    a = np.zeros((1, features, rank), dtype)
    inputs[branch.lora_a] = surgeon.optional_input(branch.lora_a, [rows, features, rank_symbol], a)
    b = np.zeros((1, rank, outputs), dtype)
    inputs[branch.lora_b] = surgeon.optional_input(branch.lora_b, [rows, rank_symbol, outputs], b)
    if branch.dora:
        scale = np.ones((1, 1, outputs), dtype)
        scale_rows = f"{branch.name}.dora_rows"
        inputs[branch.dora_scale] = surgeon.optional_input(branch.dora_scale, [scale_rows, 1, outputs], scale)
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
        free_axis = weight.free_graph_shape.index(None)
        symbols[free_axis] = f"{weight.module}.outputs"
    surgeon.free_value_name(weight.name)
    value = surgeon.optional_input(weight.name, symbols, np.ascontiguousarray(default))
    if not weight.has_rows:
        table = site.table_reader
        replaced = site.value if table is None else table.inputs[0]
        assert replaced is not None  # of a lookup
        given = value.type  # what turned a table may say none
        surgeon.replace(replaced, value)
        value.type = given
        value.shape = ir.Shape(symbols)  # a table's length is free
        turning = replaced.producer()
        if turning is not None:
            surgeon.drop_dead(turning)
        if site.value.name in surgeon.graph.initializers:
            surgeon.free_name(site.value)
    return value
