"""The manifest: what a package says of itself in `onnx_lora.json`. It knows versions of the format and how JSON holds
them; it opens no file.

The rule by which manifests live on: `format_version` is the version of the writer. `minimum_reader` is the lowest
version whose readers read this package rightly: they ignore the fields that they do not know. So a new field that a
reader may ignore needs nothing; one that it must know has `NEEDED_SINCE` in its metadata, and a new kind or role stands
in `_NEW_NAMES`. Older versions are upgraded in memory (`older_manifests.py`), and what is written is of today's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx_lora.codec import Codec, UnknownNameError
from onnx_lora.errors import PackageError
from onnx_lora.kinds import KINDS, Kind
from onnx_lora.older_manifests import OLDEST_VERSION, upgrade
from onnx_lora.points import Array, Branch, InjectionPoint, WholeWeight
from onnx_lora.roles import ROLES, Role

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "GraphInfo",
    "KnownWeight",
    "Manifest",
    "Unplaced",
    "parse_manifest",
]

MANIFEST = "onnx_lora.json"

# Raised when what is written changes. 4: points and whole weights may be unproven. 5: kinds and roles are objects, a
# part is "quantized" once or not at all, and `minimum_reader` says who may read.
FORMAT_VERSION = 5

# No reader before knows kinds and roles as objects.
_LOWEST_READER = 5

# The first version whose readers know a kind or a role, by its class. Those of format 5 need no entry.
_NEW_NAMES: Mapping[type, int] = {}

_CODEC = Codec({Kind: KINDS, Role: ROLES})


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A weighted node that got no point, and why."""

    node: str
    """The node's name, or what stands for it."""

    reason: str
    """Why it got no point."""

    modules: tuple[str, ...] = ()
    """The modules it may belong to, as far as names and weights tell."""


@dataclass(frozen=True, slots=True)
class KnownWeight:
    """The weight of a module without a point, by its digest."""

    module: str
    """The torch module path."""

    dtype: str
    """The type that the graph keeps it in."""

    sha256: str
    """SHA-256 of it in torch's layout, C order."""

    @property
    def is_quantized(self) -> bool:
        """False: of a quantized weight no digest would tell."""
        return False


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """One graph of a package, with injection points and without."""

    name: str
    """What the graph is called where a package has several."""

    file: str
    """The ONNX file with injection points."""

    base_file: str
    """The ONNX file without."""

    points: tuple[InjectionPoint, ...]
    """The injection points."""

    branches: tuple[Branch, ...] = ()
    """Through which graph inputs the points' tensors enter: every point is in one."""

    replaceable: tuple[WholeWeight, ...] = ()
    """The whole weights that adapters may replace."""

    untargeted: tuple[str, ...] = ()
    """Modules that were found, and not asked for when the points were made."""

    unplaced: tuple[Unplaced, ...] = ()
    """Nodes with weights that got no point."""

    tables: tuple[KnownWeight, ...] | None = None
    """Of the untargeted modules the tables of embeddings, and those whose weight may be one with a table: output heads,
    and what has a table's shape. Quantized ones stay out. Left out by writers that did not compare them."""

    @property
    def modules(self) -> frozenset[str]:
        """Every module that the graph names: with a point, with a replaceable weight, or found and not asked for."""
        with_points = [point.module for point in self.points]
        with_weights = [weight.module for weight in self.replaceable]
        return frozenset([*with_points, *with_weights, *self.untargeted])

    @property
    def adapter_inputs(self) -> frozenset[str]:
        """The graph inputs that adapters fill."""
        names = {weight.name for weight in self.replaceable}
        for branch in self.branches:
            names.update(branch.names)
        return frozenset(names)

    def inputs(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """An adapter's tensors, by point and parameter, as the inputs of this graph; tensors that this graph has no
        input for are left out."""
        points = {point.module: point for point in self.points}
        inputs: dict[str, Array] = {}
        for weight in self.replaceable:
            if weight.name in tensors:
                inputs[weight.name] = tensors[weight.name]
        for branch in self.branches:
            inputs.update(branch.inputs(tensors, points))
        return inputs

    def with_doubts(self, doubt: Callable[[str], str]) -> GraphInfo:
        """The graph with other doubts about its points and whole weights, by module and by parameter name."""
        points = tuple(replace(point, unproven=doubt(point.module)) for point in self.points)
        weights = tuple(replace(weight, unproven=doubt(weight.name)) for weight in self.replaceable)
        return replace(self, points=points, replaceable=weights)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `onnx_lora.json` holds."""

    format_version: int
    """The version of the format that the writer wrote."""

    producer: str
    """What wrote it."""

    source: dict[str, str]
    """What it was made from: `made_by`, `from`, `base` (the model's name by its config or the hub's cache), `task`,
    `precision`, and the versions of the libraries that wrote its graphs (`transformers`)."""

    graphs: tuple[GraphInfo, ...]
    """The package's graphs, at least one."""

    untrained: tuple[str, ...] | None = None
    """Parameters that the checkpoint lacked, and that are random numbers: a head for an adapter to bring. None: nobody
    knows whether there are any."""

    @property
    def minimum_reader(self) -> int:
        """The lowest format version whose readers read this package rightly."""
        used = set[type]()
        for graph in self.graphs:
            used.update(type(point.kind) for point in graph.points)
            used.update(type(weight.role) for weight in graph.replaceable)
        newest_name = max((_NEW_NAMES.get(name, 0) for name in used), default=0)
        return max(_LOWEST_READER, _CODEC.needed_since(self.graphs), newest_name)

    def to_json(self) -> str:
        """The text of the file, in today's format."""
        encoded = _CODEC.encode(replace(self, format_version=FORMAT_VERSION))
        versions = {"format_version": encoded.pop("format_version"), "minimum_reader": self.minimum_reader}
        return json.dumps({**versions, **encoded}, indent=1) + "\n"


def parse_manifest(data: dict[str, Any], file: Path) -> Manifest:
    """The manifest that a JSON object of any version holds, as one of today. `data` is changed; errors name `file`.

    Raises PackageError: it is none, is damaged, or is of a version that is not read here.
    """
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise PackageError("must hold a format_version; this is not a manifest of onnx-lora", path=file)
    if version < OLDEST_VERSION:
        raise PackageError(
            f"format version {version}, and this onnx-lora reads {OLDEST_VERSION} to {FORMAT_VERSION}: points are "
            "laid out otherwise since; make the package again with `onnx-lora export` or `attach`",
            path=file,
        )
    needed = data.get("minimum_reader", version)
    if type(needed) is not int or needed < 1:
        raise PackageError(f"damaged: minimum_reader must be a format version, not {needed!r}", path=file)
    if needed > FORMAT_VERSION:
        raise PackageError(
            f"format version {version}, which a reader of format {needed} reads, and this onnx-lora reads up to "
            f"{FORMAT_VERSION}; upgrade onnx-lora",
            path=file,
        )
    try:
        manifest: Manifest = _CODEC.decode(Manifest, upgrade(data, version), "manifest")
    except UnknownNameError as error:
        raise PackageError(f"{error}; upgrade onnx-lora, or make the package again", path=file) from error
    except ValueError as error:
        raise PackageError(f"damaged: {error}; make the package again", path=file) from error
    if not manifest.graphs:
        raise PackageError("damaged: it names no graph; make the package again", path=file)
    return replace(manifest, format_version=FORMAT_VERSION)
