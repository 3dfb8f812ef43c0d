"""The package: a folder with graphs, weights and a manifest. It reads, checks and writes the
folder; it knows neither ONNX nor adapters."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from onnx_lora.boundary import public, unread
from onnx_lora.companions import check_folder
from onnx_lora.errors import InputError, PackageError
from onnx_lora.json_file import read_json
from onnx_lora.kinds import Embedding
from onnx_lora.manifest import MANIFEST, GraphInfo, Manifest, parse_manifest
from onnx_lora.points import (
    FLOAT_TYPES,
    NIBBLES,
    QUANTIZED_TYPES,
    Array,
    InjectionPoint,
    StoredTensor,
    WeightPart,
    WholeWeight,
    digest,
)
from onnx_lora.quantized import dequantize
from onnx_lora.staging import replacing

__all__ = ["Package"]

# A manifest of a 100-layer model with every projection is about 1 MB; more is not a manifest.
_MANIFEST_LIMIT = 64 * 2**20  # bytes


@public
@dataclass(frozen=True)
class Package:
    """An opened package folder: its manifest, checked against the files beside it.

    `allow_unproven`: whether adapters may be bound to its unproven points.
    """

    path: Path
    manifest: Manifest
    allow_unproven: bool = False

    @staticmethod
    def open(path: str | os.PathLike[str], *, allow_unproven: bool = False) -> Package:
        """Open a package folder.

        allow_unproven: let adapters be bound to points at which the graph may compute something else than the module
            (`unproven`).

        Raises PackageError: no such folder, no manifest, a manifest that is damaged or of a newer
        version, a file that is missing or too short, or what is no file (a pipe, a device).
        """
        if not isinstance(allow_unproven, bool):
            raise InputError(f"allow_unproven must be True or False, and is {allow_unproven!r}")
        folder = Path(path)
        if folder.is_dir():
            check_folder(folder, PackageError)
        manifest = _read_manifest(folder)
        package = Package(folder, manifest, allow_unproven)
        _check_files(package)
        return package

    def allowing_unproven(self, allowed: bool) -> Package:
        """The same package, whose unproven points take adapters if it is `allowed`, or was before."""
        return replace(self, allow_unproven=True) if allowed and not self.allow_unproven else self

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def graph(self, name: str | None = None) -> GraphInfo:
        """The graph called `name`, or the only one.

        Raises PackageError: no graph of that name, or no name and several graphs.
        """
        graphs = {graph.name: graph for graph in self.manifest.graphs}
        if name is None and len(graphs) == 1:
            return self.manifest.graphs[0]
        if not isinstance(name, str) or name not in graphs:
            asked = "a graph must be named" if name is None else f"there is no graph {name!r}"
            raise PackageError(f"{asked}; this package has {', '.join(sorted(graphs))}", path=self.path)
        return graphs[name]

    @cached_property
    def points(self) -> Mapping[str, InjectionPoint]:
        """Every injection point by module, over all graphs; `per_row` where every graph has it."""
        points: dict[str, InjectionPoint] = {}
        for point in (point for graph in self.manifest.graphs for point in graph.points):
            known = points.get(point.module, point)
            points[point.module] = replace(
                point, per_row=point.per_row and known.per_row, unproven=known.unproven or point.unproven
            )
        return points

    @cached_property
    def replaceable(self) -> Mapping[str, WholeWeight]:
        """Every replaceable weight by torch parameter name, over all graphs; `per_row` where every graph has it."""
        weights: dict[str, WholeWeight] = {}
        for weight in (weight for graph in self.manifest.graphs for weight in graph.replaceable):
            known = weights.get(weight.name, weight)
            free = weight.free_outputs and known.free_outputs
            doubt = known.unproven or weight.unproven
            weights[weight.name] = replace(
                weight, per_row=weight.per_row and known.per_row, free_outputs=free, unproven=doubt
            )
        return weights

    @property
    def base_names(self) -> tuple[str, ...]:
        """What the model that the package was made from is called: on the hub, by its config, or as a folder."""
        source = self.manifest.source
        names = [source.get("base", "")]
        if source.get("made_by") in ("genai", "optimum"):  # of others it is a file or a class
            names.append(source.get("from", ""))
        return tuple(name for name in dict.fromkeys(names) if name)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Every module that a graph names: with a point, with a replaceable weight, or found and not asked for."""
        return frozenset().union(*(graph.modules for graph in self.manifest.graphs))

    @cached_property
    def unproven(self) -> Mapping[str, str]:
        """Modules and parameters of which the graph may compute something else, and why."""
        doubts = {module: point.unproven for module, point in self.points.items()}
        doubts |= {name: weight.unproven for name, weight in self.replaceable.items()}
        return {name: doubt for name, doubt in doubts.items() if doubt}

    def record_proof(self, names: Collection[str]) -> Package:
        """Write down that these modules and parameters were proven, and give the package as it is then.

        Raises StorageError: the manifest cannot be written.
        """
        left = {name: doubt for name, doubt in self.unproven.items() if name not in names}
        proven = tuple(graph.with_doubts(lambda name: left.get(name, "")) for graph in self.manifest.graphs)
        manifest = replace(self.manifest, graphs=proven)
        with replacing(self.path / MANIFEST) as place:
            place.write_text(manifest.to_json(), "utf-8")
        return replace(self, manifest=manifest)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the base weights of all points: equal for equal bases with equal points."""
        lines = sorted(f"{point.module} {point.sha256}\n" for point in self.points.values())
        return sha256("".join(lines).encode()).hexdigest()

    def read(self, stored: StoredTensor) -> Array:
        """A stored tensor, read-only: mapped from disk, so nothing may keep it; 4-bit numbers as 8-bit ones, in memory.

        Raises PackageError: its file is gone since the package was opened, or was cut off.
        """
        try:
            if stored.dtype in NIBBLES:
                return self._read_nibbles(stored)
            return np.memmap(
                self.path / stored.file,
                dtype=np.dtype(stored.dtype).newbyteorder("<"),
                mode="r",
                offset=stored.offset,
                shape=stored.shape,
            )
        except (OSError, ValueError) as error:
            cure = "make the package again, or copy it again"
            raise unread(error, self.path / stored.file, PackageError, cure) from error

    def _read_nibbles(self, stored: StoredTensor) -> Array:
        data = np.memmap(self.path / stored.file, np.uint8, "r", stored.offset, (stored.size,))
        numbers = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[: int(np.prod(stored.shape))]
        signed = numbers.astype(np.int8) - ((numbers & 8) << 1).astype(np.int8)
        return (signed if stored.dtype == "int4" else numbers).reshape(stored.shape)

    def weight(self, part: WeightPart) -> Array:
        """The values of a part's whole initializer; of a quantized one in float32, `[rows, columns]`."""
        values = self.read(part.stored)
        quantized = part.quantized
        if quantized is None:
            return values
        zero_point = None if quantized.zero_point is None else self.read(quantized.zero_point.stored)
        return dequantize(quantized.scheme, values, self.read(quantized.scale.stored), zero_point)

    def module_weight(self, point: InjectionPoint) -> Array:
        """W0 of a point as the graph computes with it, `[in, out]` (of a convolution in groups `[in / groups, out]`);
        dequantized where it is quantized."""
        dtype = "float32" if point.is_quantized else point.dtype
        weight = np.zeros((point.weight_inputs, point.out_features), dtype)
        for part in point.parts:
            weight[:, part.first : part.first + part.outputs] = part.window(self.weight(part))
        return weight

    def mark(self, point: InjectionPoint) -> str:
        """What tells the values that a point computes with from those of another precision of the same base."""
        if not point.is_quantized:
            return "float"
        return digest(self.module_weight(point))

    @cached_property
    def dora(self) -> frozenset[str]:
        """The modules that take DoRA's scale in every graph that has them."""
        branches = [branch for graph in self.manifest.graphs for branch in graph.branches]
        without = {module for branch in branches if not branch.dora for module in branch.modules}
        return frozenset(module for branch in branches for module in branch.modules) - without

    @property
    def quantized(self) -> bool:
        """Whether any point lies on a quantized weight."""
        return any(point.is_quantized for point in self.points.values())

    def default(self, weight: WholeWeight) -> Array:
        """The base's own value of a replaceable weight, as its graph input takes it, in memory of its own.

        Raises PackageError: the file is gone, or holds other values than the package was made with.
        """
        part = weight.parts[0]
        values = weight.from_initializer(np.array(self.read(part.stored)), part)
        if digest(weight.to_torch(values)) != weight.sha256:
            raise PackageError(
                f"must hold the {weight.name} that the package was made with, and holds other values: its files may be "
                "replaced by copies, and never overwritten; make the package again, or copy it again",
                path=self.path / part.stored.file,
            )
        return values.astype(weight.dtype, copy=False)


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    if folder.suffix == ".onnx" and folder.is_file():
        raise PackageError(
            "must be a package, and is an ONNX model without injection points; give it some first: "
            f"onnx-lora attach {folder} PACKAGE",
            path=folder,
        )
    if not folder.is_dir():
        raise PackageError("a package must be a folder; make one with `onnx-lora export` or `attach`", path=folder)
    if not file.exists():
        raise PackageError(
            f"no {MANIFEST} in it, so it is not a package, or only half of one; "
            "make one with `onnx-lora export` or `attach`",
            path=folder,
        )
    return parse_manifest(read_json(file, PackageError, what="a manifest", limit=_MANIFEST_LIMIT), file)


def _check_files(package: Package) -> None:
    problems: list[str] = []
    lengths: dict[str, int] = {}
    needed: dict[str, int] = {}
    for graph in package.manifest.graphs:
        for file in (graph.file, graph.base_file):
            needed[file] = max(needed.get(file, 0), 1)
        owners: tuple[InjectionPoint | WholeWeight, ...] = (*graph.points, *graph.replaceable)
        for owner in owners:
            if owner.dtype not in FLOAT_TYPES:
                problems.append(f"{owner.dtype} is no type of weights known here; known are {FLOAT_TYPES}")
                continue
            problems += [f"{part.initializer}: {problem}" for part in owner.parts for problem in _part_problems(part)]
            if isinstance(owner, InjectionPoint):
                problems += _coverage_problems(owner)
            else:
                problems += _whole_problems(owner)
            for name, stored, allowed in (entry for part in owner.parts for entry in _tensors(part)):
                if stored.dtype not in allowed or stored.offset < 0 or min(stored.shape, default=1) < 0:
                    problems.append(f"{name}: impossible offset, shape or type")
                    continue
                end = stored.offset + stored.size
                needed[stored.file] = max(needed.get(stored.file, 0), end)
        problems += _branch_problems(graph)
    for file, length in sorted(needed.items()):
        if Path(file).name != file:
            problems.append(f"{file!r}: files must lie in the package folder itself")
            continue
        try:
            lengths[file] = (package.path / file).stat().st_size
        except (OSError, ValueError):  # of names that no file can have too
            problems.append(f"{file} is missing")
            continue
        if lengths[file] < length:
            problems.append(f"{file} has {lengths[file]} bytes and must have at least {length}: it was cut off")
    if problems:
        raise PackageError(
            "the package is not whole; make it again, or copy it again",
            path=package.path,
            problems=sorted(set(problems)),
        )


def _tensors(part: WeightPart) -> Iterator[tuple[str, StoredTensor, tuple[str, ...]]]:
    """Every tensor a part is made of: name, place, and the types it may have."""
    quantized = part.quantized
    if quantized is None:
        yield part.initializer, part.stored, FLOAT_TYPES
        return
    yield part.initializer, part.stored, QUANTIZED_TYPES
    yield quantized.scale.initializer, quantized.scale.stored, FLOAT_TYPES
    if quantized.zero_point is not None:
        yield quantized.zero_point.initializer, quantized.zero_point.stored, (*QUANTIZED_TYPES, *FLOAT_TYPES)


def _part_problems(part: WeightPart) -> list[str]:
    """What of a part contradicts itself. Sizes only: the values are anybody's."""
    if min(part.start, part.first, part.outputs - 1) < 0:
        return ["impossible outputs"]
    quantized = part.quantized
    if quantized is None:
        return []
    zero_point = quantized.zero_point
    zeros = None if zero_point is None else (zero_point.stored.dtype, zero_point.stored.shape)
    wrong = quantized.scheme.problem(part.stored.shape, quantized.scale.stored.shape, zeros)
    return [] if wrong is None else [wrong]


def _coverage_problems(point: InjectionPoint) -> list[str]:
    """Where the parts of a point are not its whole weight."""
    problems: list[str] = []
    if (wrong := point.kind.problem(point.in_features, point.out_features)) is not None:
        return [f"{point.module}: {wrong}"]
    for part in point.parts:
        inputs, outputs = part.matrix
        if inputs != point.weight_inputs or part.start + part.outputs > outputs:
            problems.append(f"{part.initializer}: does not hold {point.module}'s weight")
        # MatMulNBits keeps blocks along the inputs, a table along its features.
        in_blocks = part.quantized is not None and part.quantized.scheme.layout == "blocks"
        if in_blocks and part.transposed == isinstance(point.kind, Embedding):
            problems.append(f"{part.initializer}: its blocks lie along the wrong axis")
    pieces = sorted({(part.first, part.first + part.outputs) for part in point.parts})
    if [0, *(end for _, end in pieces)] != [*(begin for begin, _ in pieces), point.out_features]:
        problems.append(f"{point.module}: its parts are not its whole weight")
    return problems


def _whole_problems(weight: WholeWeight) -> list[str]:
    """Where a whole weight has not the shape of its role, or not one place."""
    if min(weight.shape, default=1) < 0:
        return [f"{weight.name}: impossible shape"]
    if not weight.parts:
        return [f"{weight.name}: lies nowhere"]
    wrong = weight.role.problem(weight.shape)
    if wrong is None and weight.free_outputs and weight.role.free_axis is None:
        wrong = "has no axis whose length is free"
    return [] if wrong is None else [f"{weight.name}: {wrong}"]


def _branch_problems(graph: GraphInfo) -> list[str]:
    """A point without a branch would take adapters and do nothing."""
    known = {point.module: (point.kind, point.in_features, point.dtype) for point in graph.points}
    points, entered = set(known), [set(branch.modules) for branch in graph.branches]
    all_entered = set().union(*entered)
    return [
        *(f"{module}: a point that no branch leads to" for module in sorted(points - all_entered)),
        *(f"{module}: a branch to what is no point" for module in sorted(all_entered - points)),
        *(f"graph {graph.name}: a branch without modules" for modules in entered if not modules),
        *(
            f"{branch.name}: a branch whose modules differ in inputs or type, or come twice"
            for branch in graph.branches
            if len({known.get(module) for module in branch.modules}) > 1
            or len(set(branch.modules)) < len(branch.modules)
        ),
    ]
