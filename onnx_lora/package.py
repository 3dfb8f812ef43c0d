"""The package: a folder with graphs, weights and a manifest. It opens the folder and reads weights; it knows neither
ONNX nor adapters."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lora.boundary import public, translate_unread
from onnx_lora.companions import check_folder
from onnx_lora.errors import InputError, PackageError
from onnx_lora.json_file import read_json
from onnx_lora.manifest import MANIFEST, GraphInfo, KnownWeight, Manifest, parse_manifest
from onnx_lora.manifest_checks import find_problems
from onnx_lora.points import NIBBLES, Array, InjectionPoint, StoredTensor, WeightPart, WholeWeight, digest
from onnx_lora.quantized import dequantize
from onnx_lora.staging import replacing
from onnx_lora.whatis import Thing, explain

__all__ = ["Package"]

# Of packages that these made, the manifest's `from` is a file or a class, and no checkpoint.
_WITHOUT_CHECKPOINT = ("attach", "torch.onnx")

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
        problems = find_problems(manifest.graphs, folder)
        if problems:
            raise PackageError(
                "the package is not whole; make it again, or copy it again", path=folder, problems=problems
            )
        return Package(folder, manifest, allow_unproven)

    def allowing_unproven(self, allowed: bool) -> Package:
        """The same package, whose unproven points take adapters if it is `allowed`, or was before."""
        return replace(self, allow_unproven=True) if allowed and not self.allow_unproven else self

    @property
    def name(self) -> str:
        """The folder's own name."""
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
    def config(self) -> Mapping[str, Any]:
        """The `config.json` of the model that the package was made of, by Hugging Face's names; empty where there is
        none, or none that can be read."""
        try:
            return read_json(self.path / "config.json", PackageError)
        except PackageError:
            return {}

    @cached_property
    def points(self) -> Mapping[str, InjectionPoint]:
        """Every injection point by module, over all graphs; `per_row` where every graph has it."""
        points: dict[str, InjectionPoint] = {}
        for graph in self.manifest.graphs:
            for point in graph.points:
                known = points.get(point.module, point)
                points[point.module] = replace(
                    point,
                    per_row=point.per_row and known.per_row,
                    unproven=known.unproven or point.unproven,
                )
        return points

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """The SHA-256 of the base's own weights: of every point by its module, of every replaceable weight by its
        name."""
        digests = {module: point.sha256 for module, point in self.points.items()}
        for name, weight in self.replaceable.items():
            digests[name] = weight.sha256
        return digests

    @cached_property
    def replaceable(self) -> Mapping[str, WholeWeight]:
        """Every replaceable weight by torch parameter name, over all graphs; `per_row` where every graph has it."""
        weights: dict[str, WholeWeight] = {}
        for graph in self.manifest.graphs:
            for weight in graph.replaceable:
                known = weights.get(weight.name, weight)
                weights[weight.name] = replace(
                    weight,
                    per_row=weight.per_row and known.per_row,
                    free_outputs=weight.free_outputs and known.free_outputs,
                    unproven=known.unproven or weight.unproven,
                )
        return weights

    @cached_property
    def tables(self) -> Mapping[str, KnownWeight]:
        """Of the modules without a point the tables of embeddings, and what may be tied to one, over all graphs."""
        tables: dict[str, KnownWeight] = {}
        for graph in self.manifest.graphs:
            for known in graph.tables or ():
                tables[known.module] = known
        return tables

    @property
    def base_names(self) -> tuple[str, ...]:
        """What the model that the package was made from is called: on the hub, by its config, or as a folder."""
        source = self.manifest.source
        names = [source.get("base", "")]
        if source.get("made_by", "attach") not in _WITHOUT_CHECKPOINT:
            names.append(source.get("from", ""))
        return tuple(name for name in dict.fromkeys(names) if name)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Every module that a graph names: with a point, with a replaceable weight, or found and not asked for."""
        return frozenset().union(*(graph.modules for graph in self.manifest.graphs))

    @cached_property
    def unproven(self) -> Mapping[str, str]:
        """Modules and parameters of which the graph may compute something else, and why."""
        doubts: dict[str, str] = {}
        for module, point in self.points.items():
            if point.unproven:
                doubts[module] = point.unproven
        for name, weight in self.replaceable.items():
            if weight.unproven:
                doubts[name] = weight.unproven
        return doubts

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
        lines = [f"{point.module} {point.sha256}\n" for point in self.points.values()]
        return sha256("".join(sorted(lines)).encode()).hexdigest()

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
            raise translate_unread(error, self.path / stored.file, PackageError, cure) from error

    def _read_nibbles(self, stored: StoredTensor) -> Array:
        data = np.memmap(self.path / stored.file, np.uint8, "r", stored.offset, (stored.size,))
        pairs = np.stack([data & 15, data >> 4], axis=-1)
        numbers = pairs.reshape(-1)[: math.prod(stored.shape)]
        if stored.dtype == "uint4":
            return numbers.reshape(stored.shape)
        sign = (numbers & 8) << 1  # 16 where the number is negative
        signed = numbers.astype(np.int8) - sign.astype(np.int8)
        return signed.reshape(stored.shape)

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
        taking, without = set[str](), set[str]()
        for graph in self.manifest.graphs:
            for branch in graph.branches:
                (taking if branch.dora else without).update(branch.modules)
        return frozenset(taking - without)

    @property
    def quantized(self) -> bool:
        """Whether any point lies on a quantized weight."""
        return any(point.is_quantized for point in self.points.values())

    def has_value(self, parameter: str, value: Array) -> bool:
        """Whether a value is the base's own of a parameter, in the type that the package keeps that in; false where the
        package knows no digest of it."""
        module, _, own = parameter.rpartition(".")
        owner: InjectionPoint | WholeWeight | KnownWeight | None = self.replaceable.get(parameter)
        if owner is None and own == "weight":
            owner = self.points.get(module) or self.tables.get(module)
        if owner is None:
            return False
        with np.errstate(over="ignore"):
            return digest(value.astype(owner.dtype)) == owner.sha256

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
    other = explain(folder, Thing.PACKAGE)
    is_half = (folder / "base.onnx").exists()  # a package without its manifest
    if other is not None and not is_half:
        raise PackageError(f"must be a package, and {other}", path=folder)
    if not folder.is_dir():
        raise PackageError("a package must be a folder; make one with `onnx-lora export` or `attach`", path=folder)
    if not file.exists():
        raise PackageError(
            f"no {MANIFEST} in it, so it is not a package, or only half of one; "
            "make one with `onnx-lora export` or `attach`",
            path=folder,
        )
    return parse_manifest(read_json(file, PackageError, what="a manifest", limit=_MANIFEST_LIMIT), file)
