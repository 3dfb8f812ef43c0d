"""Fold an adapter into a package, and write the result as an ordinary model folder. It streams: beside
one weight at a time it holds nothing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from onnx_lora.adapters import BoundAdapter
from onnx_lora.adapters.compose import make_blend
from onnx_lora.boundary import public, translate_unread
from onnx_lora.companions import copy_file
from onnx_lora.errors import InputError, PackageError
from onnx_lora.folded import KEY, FoldedIn, FoldedModel
from onnx_lora.heads import VOCABULARY_HEADS
from onnx_lora.json_text import parse_json
from onnx_lora.manifest import MANIFEST, GraphInfo
from onnx_lora.package import Package
from onnx_lora.points import NIBBLES, Array, StoredTensor, align_offset
from onnx_lora.roles import LinearWeight
from onnx_lora.runtime import _onnx
from onnx_lora.runtime.binding import AnyAdapter, AnyPackage, Mixture, bind_parts, open_package
from onnx_lora.runtime.merge import InitializerEdit, Progress, plan_edits
from onnx_lora.runtime.requantize import Requantize, compute_values
from onnx_lora.staging import staged

__all__ = ["fold_to", "read_folded"]

_log = logging.getLogger(__name__)

_MODEL = "model.onnx"
_DATA = "model.onnx.data"

# Copied at once.
_CHUNK = 16 * 2**20  # bytes


@dataclass
class _Data:
    """The data file in the making: equal content is written once."""

    file: IO[bytes]
    places: dict[object, tuple[int, int]] = field(default_factory=dict)  # offset and length

    def put(self, key: object, length: int, write: Callable[[IO[bytes]], None]) -> tuple[int, int]:
        if key not in self.places:
            end = self.file.tell()
            self.file.write(bytes(align_offset(end, length) - end))
            self.places[key] = self.file.tell(), length
            write(self.file)
        return self.places[key]


@public
def fold_to(
    package: AnyPackage,
    adapter: AnyAdapter | Mixture,
    out: str | os.PathLike[str],
    *,
    graph: str | None = None,
    requantize: Requantize | None = None,
    strict: bool = False,
    allow_unproven: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write `out`: a model folder with the adapter, or a blend, in its weights. Returns `out`.

    One graph becomes `model.onnx`; a package with several keeps their names. The weights lie in
    `model.onnx.data`, and the package's other files (tokenizer, configs) come along. `adapter`,
    `requantize`, `strict` and `allow_unproven` as for `fold`.

    Raises AdapterError, SelectionError, PackageError: as `fold`. OutputExistsError: `out` exists.
    StorageError: it cannot be written. MissingDependencyError: no `onnx`.
    """
    whole = open_package(package, allow_unproven=allow_unproven)
    if whole.path.resolve() in Path(out).resolve().parents:
        raise InputError("must not lie inside the package itself; choose another place", path=out)
    infos = whole.manifest.graphs if graph is None else (whole.graph(graph),)
    parts = bind_parts(adapter, whole, strict=strict)
    bound = make_blend(parts, name="blend")
    made_of = [FoldedIn.of(one, weight) for one, weight in parts]
    plans = [_Plan.of(info, bound) for info in infos]
    steps = _Steps(progress, sum(len(plan.edits) for plan in plans))
    with staged(out) as folder:
        with (folder / _DATA).open("wb") as file:
            writer = _Writer(whole, requantize, _Data(file), steps, made_of)
            for plan in plans:
                name = _MODEL if len(plans) == 1 else plan.info.file
                writer.write(plan, folder / name)
        _copy_companions(whole, folder)
        _fix_labels(plans, folder / "config.json", whole.path)
    return Path(out)


@public
def read_folded(folder: str | os.PathLike[str]) -> FoldedModel | None:
    """What a folder that `fold_to` wrote was made of; None where its graphs do not say.

    Raises PackageError: a graph cannot be read. MissingDependencyError: no `onnx`.
    """
    texts: dict[str, str] = {}
    for file in sorted(Path(folder).glob("*.onnx")):
        text = _onnx.metadata(_onnx.load(file)).get(KEY)
        if text is not None:
            texts[file.name] = text
    return FoldedModel.of(Path(folder), texts)


class _Steps:
    """Counts the weights that are written, and says so to whoever asked."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = -1
        self.count()

    def count(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclass(frozen=True)
class _Plan:
    """A graph, and what happens to its initializers, by their names."""

    info: GraphInfo
    edits: Mapping[str, InitializerEdit]

    @staticmethod
    def of(info: GraphInfo, adapter: BoundAdapter) -> _Plan:
        edits: dict[str, InitializerEdit] = {}
        for edit in plan_edits(info, adapter):
            for name in edit.tensors:
                edits[name] = edit
        return _Plan(info, edits)


@dataclass
class _Values:
    """New values by initializer, computed when the first of an edit's is asked for and dropped with its last."""

    edits: Mapping[str, InitializerEdit]
    package: Package
    requantize: Requantize | None
    waiting: dict[str, Array] = field(default_factory=dict)

    def take(self, name: str) -> Array:
        if name not in self.waiting:
            self.waiting.update(compute_values(self.edits[name], self.package, self.requantize))
        return self.waiting.pop(name)


@dataclass(frozen=True)
class _Writer:
    """Writes the graphs of a package, with their weights in one data file."""

    package: Package
    requantize: Requantize | None
    data: _Data
    steps: _Steps
    made_of: Sequence[FoldedIn]

    def write(self, plan: _Plan, target: Path) -> None:
        source = self.package.path / plan.info.base_file
        model = _onnx.load(source)
        outside = _onnx.find_externals(model, source)
        _check_places(plan.edits, outside, source)
        values = _Values(plan.edits, self.package, self.requantize)
        shapes: dict[str, tuple[int, ...]] = {}
        for external in outside:
            edit = plan.edits.get(external.name)
            if edit is None:
                offset, length = _copy(external, self.package, self.data)
            else:
                new = values.take(external.name)
                stored = edit.tensors[external.name]
                offset, length = self._put(new, edit, stored)
                if new.shape != stored.shape:
                    shapes[external.name] = new.shape
                self.steps.count()
            _onnx.place(external, _DATA, offset, length)
        _onnx.resize(model, shapes)
        _onnx.set_metadata(model, KEY, FoldedModel.text(plan.info.name, self.package, self.made_of))
        target.write_bytes(model.SerializeToString())

    def _put(self, new: Array, edit: InitializerEdit, stored: StoredTensor) -> tuple[int, int]:
        values = _pack_nibbles(new) if stored.dtype in NIBBLES else new
        little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))

        def write(file: IO[bytes]) -> None:
            file.write(little.reshape(-1).view(np.uint8).data)

        return self.data.put((edit.key, stored), little.nbytes, write)


def _check_places(edits: Mapping[str, InitializerEdit], outside: Sequence[_onnx.External], source: Path) -> None:
    """That graph and manifest mean the same bytes: else a fold would start from other weights."""
    problems: list[str] = []
    places = {external.name: external for external in outside}
    for name in sorted(edits):
        stored = edits[name].tensors[name]
        wanted = _describe_place(stored.file, stored.offset, stored.size, stored.shape)
        found = "not in a file"
        external = places.get(name)
        if external is not None:
            found = _describe_place(external.file, external.offset, external.length, external.proto.dims)
        if found != wanted:
            problems.append(f"{name} must be {wanted}, and is {found}")
    if problems:
        raise PackageError(
            "the base graph must keep its weights where the manifest says; make the package again",
            path=source,
            problems=problems,
        )


def _describe_place(file: str, offset: int, length: int, shape: Sequence[int]) -> str:
    return f"{list(shape)} in {length} bytes from {offset} of {file}"


def _pack_nibbles(values: Array) -> Array:
    """Two numbers in a byte, the first in its low bits."""
    padding = np.zeros(values.size % 2, values.dtype)
    flat = np.append(values.reshape(-1), padding).astype(np.uint8) & 15
    packed: Array = flat[::2] | (flat[1::2] << 4)
    return packed


def _copy(external: _onnx.External, package: Package, data: _Data) -> tuple[int, int]:
    def write(file: IO[bytes]) -> None:
        with _reading(package.path / external.file) as source:
            source.seek(external.offset)
            left = external.length
            while left:
                chunk = source.read(min(left, _CHUNK))
                if not chunk:
                    raise PackageError("was cut off; make the package again", path=package.path / external.file)
                file.write(chunk)
                left -= len(chunk)

    return data.put((external.file, external.offset, external.length), external.length, write)


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise translate_unread(error, path, PackageError, "make the package again") from error
    with file:
        yield file


def _copy_companions(package: Package, folder: Path) -> None:
    """Everything that is not a graph, its data, or the manifest."""
    own = {MANIFEST}
    for info in package.manifest.graphs:
        for name in (info.file, info.base_file):
            path = package.path / name
            own.add(name)
            own.update(external.file for external in _onnx.find_externals(_onnx.load(path), path))
    for companion in sorted(package.path.iterdir()):
        if companion.name in own:
            continue
        for path in [companion, *sorted(companion.rglob("*"))]:
            copy = folder / path.relative_to(package.path)
            if path.is_dir() and not path.is_symlink():
                copy.mkdir()
            else:
                copy_file(path, copy, folder=package.path, kind=PackageError)


def _fix_labels(plans: Sequence[_Plan], config: Path, package: Path) -> None:
    """Where a head got another number of outputs, the config's labels are those of another head."""
    widths: set[int] = set()
    for plan in plans:
        for edit in plan.edits.values():
            width = _new_width(edit)
            if width is not None:
                widths.add(width)
    if not widths or not config.is_file():
        return
    content = parse_json(config.read_bytes(), package / config.name, PackageError, what="a config")
    for key in ("id2label", "label2id", "num_labels"):
        content.pop(key, None)
    if len(widths) == 1:
        content["num_labels"] = widths.pop()
    config.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    _log.warning("%s: the head has another number of outputs; its labels were removed", config.name)


def _new_width(edit: InitializerEdit) -> int | None:
    """The labels that a new head counts, where they are not as many as the base's; None of what counts none."""
    if edit.new is None or not isinstance(edit.new.weight.role, LinearWeight):
        return None
    if edit.new.weight.module.rpartition(".")[2] in VOCABULARY_HEADS:
        return None
    part = edit.new.part
    width: int = edit.new.value.shape[-1]
    before = part.stored.shape[0 if part.transposed else 1]
    return None if width == before else width
