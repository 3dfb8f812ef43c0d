"""The package: a folder with graphs, weights and a manifest. It reads, checks and writes the
folder; it knows neither ONNX nor adapters."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from onnx_lora.boundary import public, unread, unwritten
from onnx_lora.companions import check_folder
from onnx_lora.errors import InputError, PackageError
from onnx_lora.kinds import KINDS, Conv, Embedding, Kind, Linear
from onnx_lora.points import (
    FLOAT_TYPES,
    NIBBLES,
    QUANTIZED_TYPES,
    Array,
    Branch,
    InjectionPoint,
    Replaceable,
    StoredTensor,
    WeightPart,
    digest,
)
from onnx_lora.quantized import dequantize
from onnx_lora.staging import scratch

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "GraphInfo",
    "Manifest",
    "Package",
    "Unplaced",
]

MANIFEST = "onnx_lora.json"

# Raised when a reader of the old version would misread the new one. 4: points and whole weights may be unproven. 5: the
# kind of a point is an object, and parts are "quantized".
FORMAT_VERSION = 5

# The oldest version that is still read.
_OLDEST_VERSION = 3

# What version 3 did not ask of graphs that somebody else exported.
_ATTACHED_BEFORE = "it was attached by an onnx-lora that did not look for traces of optimisers"

# A manifest of a 100-layer model with every projection is about 1 MB; more is not a manifest.
# Of packages that these made, the manifest's `from` is a file or a class, and no checkpoint.
_WITHOUT_CHECKPOINT = ("attach", "torch.onnx")

_MANIFEST_LIMIT = 64 * 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A weighted node that got no point, and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """One graph of a package: `file` has the injection points, `base_file` has none.

    `branches` say through which inputs the points' tensors enter. `untargeted` are modules that were found,
    but not asked for when the points were made.
    """

    name: str
    file: str
    base_file: str
    points: tuple[InjectionPoint, ...]
    branches: tuple[Branch, ...] = ()
    replaceable: tuple[Replaceable, ...] = ()
    untargeted: tuple[str, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()

    @property
    def adapter_inputs(self) -> frozenset[str]:
        """The graph inputs that adapters fill."""
        factors = [name for branch in self.branches for name in branch.names]
        return frozenset([*factors, *(weight.name for weight in self.replaceable)])

    def inputs(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """An adapter's tensors, by point and parameter, as the inputs of this graph; what it has no place for
        stays out."""
        points = {point.module: point for point in self.points}
        inputs = {weight.name: tensors[weight.name] for weight in self.replaceable if weight.name in tensors}
        for branch in self.branches:
            inputs.update(branch.inputs(tensors, points))
        return inputs


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `onnx_lora.json` holds. `source` says what made the package, from what."""

    format_version: int
    producer: str
    source: dict[str, str]
    graphs: tuple[GraphInfo, ...]

    def to_json(self) -> str:
        return json.dumps(_encoded(self), indent=1) + "\n"


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
    def replaceable(self) -> Mapping[str, Replaceable]:
        """Every replaceable weight by torch parameter name, over all graphs; `per_row` where every graph has it."""
        weights: dict[str, Replaceable] = {}
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
        if source.get("made_by", "attach") not in _WITHOUT_CHECKPOINT:
            names.append(source.get("from", ""))
        return tuple(name for name in dict.fromkeys(names) if name)

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
        proven = tuple(_with_doubts(graph, lambda name: left.get(name, "")) for graph in self.manifest.graphs)
        manifest = replace(self.manifest, graphs=proven)
        target = self.path / MANIFEST
        try:
            with scratch(self.path) as folder:
                (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
                (folder / MANIFEST).replace(target)
        except OSError as error:
            raise unwritten(error, target) from error
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
        for quantized in part.quantized:
            zeros = [self.read(zero.stored) for zero in quantized.zero_point]
            return dequantize(quantized.scheme, values, self.read(quantized.scale.stored), zeros[0] if zeros else None)
        return values

    def module_weight(self, point: InjectionPoint) -> Array:
        """W0 of a point as the graph computes with it, `[in, out]` (of a convolution in groups `[in / groups, out]`);
        dequantized where it is quantized."""
        weight = np.zeros(
            (point.weight_inputs, point.out_features),
            np.float32 if any(part.quantized for part in point.parts) else point.dtype,
        )
        for part in point.parts:
            weight[:, part.first : part.first + part.outputs] = part.window(self.weight(part))
        return weight

    def mark(self, point: InjectionPoint) -> str:
        """What tells the values that a point computes with from those of another precision of the same base."""
        if not any(part.quantized for part in point.parts):
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
        return any(part.quantized for point in self.points.values() for part in point.parts)

    def default(self, weight: Replaceable) -> Array:
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
    if not folder.is_dir():
        raise PackageError("a package must be a folder; make one with `onnx-lora export` or `attach`", path=folder)
    try:
        if file.stat().st_size > _MANIFEST_LIMIT:
            raise PackageError(f"too large for a manifest (limit {_MANIFEST_LIMIT} bytes)", path=file)
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise PackageError(
            f"no {MANIFEST} in it, so it is not a package, or only half of one; "
            "make one with `onnx-lora export` or `attach`",
            path=folder,
        ) from None
    except (OSError, ValueError) as error:
        raise unread(error, file, PackageError, "make the package again, or copy it again") from error
    except RecursionError as error:
        raise PackageError(f"cannot be read: {error}", path=file) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise PackageError("must hold a format_version; this is not a manifest of onnx-lora", path=file)
    if version < _OLDEST_VERSION:
        raise PackageError(
            f"format version {version}, and this onnx-lora reads {_OLDEST_VERSION} to {FORMAT_VERSION}: points are "
            "laid out otherwise since; make the package again with `onnx-lora export` or `attach`",
            path=file,
        )
    if version > FORMAT_VERSION:
        raise PackageError(
            f"format version {version}, and this onnx-lora reads up to {FORMAT_VERSION}; upgrade onnx-lora",
            path=file,
        )
    try:
        manifest: Manifest = _decode(Manifest, data if version >= 5 else _respelled(data), "manifest")
    except ValueError as error:
        raise PackageError(f"damaged: {error}; make the package again", path=file) from error
    if not manifest.graphs:
        raise PackageError("damaged: it names no graph; make the package again", path=file)
    return _upgraded(manifest)


def _respelled(data: Any) -> Any:
    """The JSON of version 3 or 4 in today's words."""
    if isinstance(data, list):
        return [_respelled(entry) for entry in data]
    if not isinstance(data, dict):
        return data
    words = {_RESPELLED.get(key, key): _respelled(entry) for key, entry in data.items()}
    if "in_features" in words:
        name, kernel, groups = (words.pop(key, default) for key, default in _OF_KINDS.items())
        words["kind"] = {"name": name, "kernel": kernel, "groups": groups} if name == Conv.name else {"name": name}
    return words


_RESPELLED = {"quantised": "quantized"}

# What was said of a point's kind beside each other, and what it was where it was not said.
_OF_KINDS: Mapping[str, Any] = {"kind": Linear.name, "kernel": [], "groups": 1}


def _upgraded(manifest: Manifest) -> Manifest:
    """A manifest of an older version as one of today."""
    if manifest.format_version == FORMAT_VERSION:
        return manifest
    graphs = manifest.graphs
    if manifest.format_version == 3 and manifest.source.get("made_by") == "attach":
        graphs = tuple(_with_doubts(graph, lambda _: _ATTACHED_BEFORE) for graph in graphs)
    return replace(manifest, format_version=FORMAT_VERSION, graphs=graphs)


def _with_doubts(graph: GraphInfo, doubt: Callable[[str], str]) -> GraphInfo:
    """The graph with other doubts about its points and whole weights, by module and parameter."""
    points = tuple(replace(point, unproven=doubt(point.module)) for point in graph.points)
    weights = tuple(replace(weight, unproven=doubt(weight.name)) for weight in graph.replaceable)
    return replace(graph, points=points, replaceable=weights)


def _encoded(value: Any) -> Any:
    """What JSON holds of a dataclass; a kind has its name before its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: _encoded(getattr(value, field.name)) for field in fields(value)}
        return {"name": value.name, **own} if isinstance(value, Linear | Embedding | Conv) else own
    if isinstance(value, tuple | list):
        return [_encoded(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _encoded(entry) for key, entry in value.items()}
    return value


def _decode(kind: Any, data: object, where: str) -> Any:
    """JSON data as the dataclass, tuple, literal or plain type `kind`; ValueError says where not."""
    if kind is Kind:
        if not isinstance(data, dict) or data.get("name") not in KINDS:
            raise ValueError(f"{where} must have a name of {', '.join(KINDS)}")
        own = {key: value for key, value in data.items() if key != "name"}
        return _decode(KINDS[data["name"]], own, where)
    origin = get_origin(kind)
    if is_dataclass(kind):
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object")
        known = _fields_of(kind)  # type: ignore[arg-type]
        missing = {name for name, (_, needed) in known.items() if needed} - set(data)
        if missing or not set(data) <= set(known):
            raise ValueError(f"{where} lacks {sorted(missing)}, or has more than {sorted(known)}: {sorted(data)}")
        return kind(**{name: _decode(known[name][0], data[name], f"{where}.{name}") for name in data})  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where} must be a list")
        item = get_args(kind)[0]
        return tuple(_decode(item, entry, f"{where}[{index}]") for index, entry in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object")
        return {str(key): _decode(get_args(kind)[1], entry, f"{where}.{key}") for key, entry in data.items()}
    if origin is Literal:
        if data not in get_args(kind):
            raise ValueError(f"{where} must be one of {get_args(kind)}, not {data!r}")
        return data
    if origin in (Union, types.UnionType):
        raise TypeError(f"no unions in the manifest: {where}")
    if type(data) is not kind:
        raise ValueError(f"{where} must be {kind.__name__}, not {data!r}")
    return data


@cache
def _fields_of(kind: type) -> dict[str, tuple[Any, bool]]:
    """A dataclass's fields, their types and whether each must be there: looked up once for the thousands of entries of
    a manifest."""
    hints = get_type_hints(kind)
    return {field.name: (hints[field.name], field.default is MISSING) for field in fields(kind)}


def _check_files(package: Package) -> None:
    problems: list[str] = []
    lengths: dict[str, int] = {}
    needed: dict[str, int] = {}
    for graph in package.manifest.graphs:
        for file in (graph.file, graph.base_file):
            needed[file] = max(needed.get(file, 0), 1)
        owners: tuple[InjectionPoint | Replaceable, ...] = (*graph.points, *graph.replaceable)
        for owner in owners:
            if owner.dtype not in FLOAT_TYPES:
                problems.append(f"{owner.dtype} is no type of weights known here; known are {FLOAT_TYPES}")
                continue
            problems += [f"{part.initializer}: {problem}" for part in owner.parts for problem in _part_problems(part)]
            if isinstance(owner, InjectionPoint):
                problems += _coverage_problems(owner)
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
    yield part.initializer, part.stored, QUANTIZED_TYPES if part.quantized else FLOAT_TYPES
    for quantized in part.quantized:
        yield quantized.scale.initializer, quantized.scale.stored, FLOAT_TYPES
        for zero in quantized.zero_point:
            yield zero.initializer, zero.stored, (*QUANTIZED_TYPES, *FLOAT_TYPES)


def _part_problems(part: WeightPart) -> list[str]:
    """What of a part contradicts itself. Sizes only: the values are anybody's."""
    if len(part.quantized) > 1 or any(len(entry.zero_point) > 1 for entry in part.quantized):
        return ["quantized twice, or with several zero points"]
    if min(part.start, part.first, part.outputs - 1) < 0:
        return ["impossible outputs"]
    for entry in part.quantized:
        wrong = entry.scheme.problem(
            part.stored.shape,
            entry.scale.stored.shape,
            [(zero.stored.dtype, zero.stored.shape) for zero in entry.zero_point],
        )
        if wrong is not None:
            return [wrong]
    return []


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
        if any(entry.scheme.layout == "blocks" for entry in part.quantized) and (
            part.transposed == isinstance(point.kind, Embedding)
        ):
            problems.append(f"{part.initializer}: its blocks lie along the wrong axis")
    pieces = sorted({(part.first, part.first + part.outputs) for part in point.parts})
    if [0, *(end for _, end in pieces)] != [*(begin for begin, _ in pieces), point.out_features]:
        problems.append(f"{point.module}: its parts are not its whole weight")
    return problems


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
