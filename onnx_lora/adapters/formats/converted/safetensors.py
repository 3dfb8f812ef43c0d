"""Bound adapters as `.safetensors` files of ours, with all that is known of them in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, Origin, refuse_fold_only
from onnx_lora.adapters.formats.converted.modules import MAGNITUDE, split_modules
from onnx_lora.adapters.formats.files.reading import TensorFile, parse_json
from onnx_lora.adapters.formats.format import Row
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.formats.writing import save_safetensors
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["FORMAT"]

# The metadata key of the version of what stands beside it, and that version.
_MARK = "onnx_lora"
_VERSION = "1"


class SafetensorsFormat:
    name = "safetensors"
    ending = ".safetensors"
    row = Row("`.safetensors` of ours", "its metadata", "multiplied in already", "another base's")

    def recognises(self, place: Place) -> bool:
        return place.header is not None and _MARK in place.header.metadata

    def read(self, place: Place, name: str | None) -> Adapter:
        return _read(place.tensors(), place.path, name)

    def write_bound(self, bound: BoundAdapter, out: Path) -> None:
        # A scale that the package does not take yet can be kept for one that does.
        refuse_fold_only(bound, bound.changes)
        save_safetensors(out, _kept_tensors(bound), _metadata(bound))


FORMAT = SafetensorsFormat()


def _metadata(bound: BoundAdapter) -> dict[str, str]:
    # Of DoRA the magnitudes are there, and each package computes its own scales.
    made_of = {name: mark for name, mark in bound.made_of.items() if name not in bound.magnitudes}
    return {
        _MARK: _VERSION,
        "name": bound.name,
        "source": Path(bound.origin.path).name,
        "source_sha256": bound.origin.sha256,
        "method": bound.origin.method,
        "base_model": bound.origin.base_model,
        "package_base": ", ".join(bound.base_names),
        "coverage": json.dumps(asdict(bound.coverage)),
        "base_digests": json.dumps(dict(bound.base_digests)),
        "made_of": json.dumps(made_of),
    }


def _kept_tensors(bound: BoundAdapter) -> dict[str, Array]:
    """The tensors, and DoRA's magnitudes. Its scales are those of float weights: a quantized weight has norms of its
    own, and its package computes them again."""
    recomputed: set[str] = set()
    for graph in bound.graphs:
        for point in graph.points:
            if point.module in bound.magnitudes and point.is_quantized:
                recomputed.add(point.dora_scale)
    tensors = {name: tensor for name, tensor in bound.tensors.items() if name not in recomputed}
    magnitudes = {f"{module}{MAGNITUDE}": values for module, values in bound.magnitudes.items()}
    return tensors | magnitudes


def _read(file: TensorFile, path: Path, name: str | None) -> Adapter:
    """`M.lora_A.weight` `[1, in, r]`, `M.lora_B.weight` `[1, r, out]` with the scale in it, `M.dora_scale`
    `[1, 1, out]`, `M.lora_magnitude_vector` `[out]`; the rest are whole weights as their inputs take them.

    Raises AdapterFileError: damaged, or of a newer version.
    """
    metadata = file.metadata
    if metadata[_MARK] != _VERSION:
        raise AdapterFileError(
            f"format version {metadata[_MARK]!r}, and this onnx-lora reads {_VERSION!r}; upgrade onnx-lora", path=path
        )
    known = _Metadata.parse(metadata, path)
    modules = split_modules(file.tensors, path)
    origin = Origin(str(path), file.sha256, "safetensors", metadata.get("method", ""), metadata.get("base_model", ""))
    return Adapter(
        name or metadata.get("name") or path.stem,
        modules.deltas,
        modules.replacements,
        origin,
        known.base_digests,
        notes=known.notes,
        changes=modules.scales,
        made_of=known.made_of,
    )


@dataclass(frozen=True)
class _Metadata:
    """What the metadata holds as JSON."""

    notes: tuple[str, ...]
    base_digests: Mapping[str, str]
    made_of: Mapping[str, str]

    @classmethod
    def parse(cls, metadata: Mapping[str, str], path: Path) -> _Metadata:
        """Raises AdapterFileError: damaged."""
        coverage = parse_json(metadata.get("coverage", "{}").encode(), path, what="coverage")
        digests = parse_json(metadata.get("base_digests", "{}").encode(), path, what="base_digests")
        made_of = parse_json(metadata.get("made_of", "{}").encode(), path, what="made_of")
        notes = coverage.get("notes", [])
        are_notes = isinstance(notes, list) and all(isinstance(note, str) for note in notes)
        are_marks = all(isinstance(text, str) for text in [*digests.values(), *made_of.values()])
        if not are_notes or not are_marks:
            raise AdapterFileError("its metadata is damaged; convert the adapter again", path=path)
        return cls(tuple(notes), digests, made_of)
