"""What a folded model was made of, as its graphs say in their metadata. It reads JSON texts, and no graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lora.manifest import FORMAT_VERSION, GraphInfo, Manifest
from onnx_lora.package import Package
from onnx_lora.strength import Strength, Weight, as_strength

if TYPE_CHECKING:
    from onnx_lora.adapters import BoundAdapter

__all__ = ["KEY", "FoldedIn", "FoldedModel"]

# The key of the metadata.
KEY = "onnx_lora.folded"


@dataclass(frozen=True)
class FoldedIn:
    """An adapter that was folded in. `weight`: of its modules, but for those of `groups`. `sha256`: of its weight
    file."""

    name: str
    weight: float
    method: str
    sha256: str
    groups: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(bound: BoundAdapter, weight: Weight) -> FoldedIn:
        own = as_strength(weight)
        groups = dict(own.groups) if isinstance(own, Strength) else {}
        rest = own.rest if isinstance(own, Strength) else own
        return FoldedIn(bound.name, rest, bound.origin.method, bound.origin.sha256, groups)


@dataclass(frozen=True)
class FoldedModel:
    """A folded model. `graphs`: the package's names of its graphs, by file. `source`: what the package was made from.
    `fingerprint`: the package's. `adapters`: what was folded in; of a blend that was read from one file, that."""

    path: Path
    graphs: Mapping[str, str]
    source: Mapping[str, str]
    fingerprint: str
    adapters: Sequence[FoldedIn]

    @staticmethod
    def text(graph: str, package: Package, adapters: Sequence[FoldedIn]) -> str:
        """The metadata of one graph: the same text every time, and no path."""
        facts = {
            "graph": graph,
            "source": dict(package.manifest.source),
            "fingerprint": package.fingerprint,
            "adapters": [asdict(adapter) for adapter in adapters],
        }
        return json.dumps(facts, sort_keys=True)

    @staticmethod
    def of(path: Path, texts: Mapping[str, str]) -> FoldedModel | None:
        """The model whose graphs, by file, have these metadata; None: they are damaged, or there are none."""
        graphs: dict[str, str] = {}
        facts: Any = None
        try:
            for file, text in texts.items():
                facts = json.loads(text)
                graphs[file] = str(facts["graph"])
            if facts is None:
                return None
            adapters = [FoldedIn(**entry) for entry in facts["adapters"]]
            source = {str(name): str(value) for name, value in facts["source"].items()}
            return FoldedModel(path, graphs, source, str(facts["fingerprint"]), adapters)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def as_package(self) -> Package:
        """The folder as a package without points, whose graphs can be run and compared."""
        graphs = tuple(GraphInfo(name, file, file, ()) for file, name in self.graphs.items())
        return Package(self.path, Manifest(FORMAT_VERSION, "onnx-lora", dict(self.source), graphs))
