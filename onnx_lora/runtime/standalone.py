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

from onnx_lora.boundary import public, unread
from onnx_lora.companions import copy_file
from onnx_lora.errors import InputError, PackageError
from onnx_lora.heads import VOCABULARY_HEADS
from onnx_lora.json_text import parse_json
from onnx_lora.manifest import MANIFEST, GraphInfo
from onnx_lora.package import Package
from onnx_lora.points import NIBBLES, Array, align_offset
from onnx_lora.roles import LinearWeight
from onnx_lora.runtime import _onnx
from onnx_lora.runtime.bound import AnyAdapter, AnyPackage, Mixture, mixed, opened
from onnx_lora.runtime.folding import Progress
from onnx_lora.runtime.merge import Edit, edits
from onnx_lora.runtime.requantize import Requantize, merged
from onnx_lora.staging import staged

__all__ = ["fold_to"]

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
    whole = opened(package).allowing_unproven(allow_unproven)
    if whole.path.resolve() in Path(out).resolve().parents:
        raise InputError("must not lie inside the package itself; choose another place", path=out)
    infos = whole.manifest.graphs if graph is None else (whole.graph(graph),)
    bound = mixed(adapter, whole, strict=strict)
    plans = [(info, {name: edit for edit in edits(info, bound) for name in edit.tensors}) for info in infos]
    step = _stepper(progress, sum(len(plan) for _, plan in plans))
    with staged(out) as folder:
        with (folder / _DATA).open("wb") as file:
            data = _Data(file)
            for info, plan in plans:
                values = _Values(plan, whole, requantize)
                _write(info, values, whole, folder / (_MODEL if len(infos) == 1 else info.file), data, step)
        _copy_companions(whole, folder)
        _fix_labels([edit for _, plan in plans for edit in plan.values()], folder / "config.json", whole.path)
    return Path(out)


def _stepper(progress: Progress | None, total: int) -> Callable[[], None]:
    done = -1

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    step()
    return step


@dataclass
class _Values:
    """New values by initializer, computed when the first of an edit's is asked for and dropped with its last."""

    plan: Mapping[str, Edit]
    package: Package
    requantize: Requantize | None
    waiting: dict[str, Array] = field(default_factory=dict)

    def take(self, name: str) -> Array:
        if name not in self.waiting:
            self.waiting.update(merged(self.plan[name], self.package, self.requantize))
        return self.waiting.pop(name)


def _write(
    info: GraphInfo, new: _Values, package: Package, target: Path, data: _Data, step: Callable[[], None]
) -> None:
    plan = new.plan
    source = package.path / info.base_file
    model = _onnx.load(source)
    outside = _onnx.externals(model, source)
    _check_places(plan, outside, source)
    shapes: dict[str, tuple[int, ...]] = {}
    for external in outside:
        edit = plan.get(external.name)
        if edit is None:
            place = _copy(external, package, data)
        else:
            values = new.take(external.name)
            stored = edit.tensors[external.name]
            data_values = _nibbles(values) if stored.dtype in NIBBLES else values
            place = data.put((edit.key, stored), data_values.nbytes, _writer(data_values))
            if values.shape != stored.shape:
                shapes[external.name] = values.shape
            step()
        _onnx.place(external, _DATA, *place)
    _onnx.resize(model, shapes)
    target.write_bytes(model.SerializeToString())


def _check_places(plan: Mapping[str, Edit], outside: Sequence[_onnx.External], source: Path) -> None:
    """That graph and manifest mean the same bytes: else a fold would start from other weights."""
    places = {
        external.name: _place(external.file, external.offset, external.length, external.proto.dims)
        for external in outside
    }
    wanted = {
        name: _place(stored.file, stored.offset, stored.size, stored.shape)
        for name, stored in ((name, edit.tensors[name]) for name, edit in plan.items())
    }
    if wrong := sorted(name for name in wanted if places.get(name) != wanted[name]):
        raise PackageError(
            "the base graph must keep its weights where the manifest says; make the package again",
            path=source,
            problems=[f"{name} must be {wanted[name]}, and is {places.get(name, 'not in a file')}" for name in wrong],
        )


def _place(file: str, offset: int, length: int, shape: Sequence[int]) -> str:
    return f"{list(shape)} in {length} bytes from {offset} of {file}"


def _nibbles(values: Array) -> Array:
    """Two numbers in a byte, the first in its low bits."""
    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, values.dtype)).astype(np.uint8) & 15
    packed: Array = flat[::2] | (flat[1::2] << 4)
    return packed


def _writer(values: Array) -> Callable[[IO[bytes]], None]:
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))

    def write(file: IO[bytes]) -> None:
        file.write(little.reshape(-1).view(np.uint8).data)

    return write


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
        raise unread(error, path, PackageError, "make the package again") from error
    with file:
        yield file


def _copy_companions(package: Package, folder: Path) -> None:
    """Everything that is not a graph, its data, or the manifest."""
    graphs = {name for info in package.manifest.graphs for name in (info.file, info.base_file)}
    own = {MANIFEST, *graphs}
    for name in graphs:
        path = package.path / name
        own |= {external.file for external in _onnx.externals(_onnx.load(path), path)}
    for companion in sorted(package.path.iterdir()):
        if companion.name in own:
            continue
        for path in [companion, *sorted(companion.rglob("*"))]:
            copy = folder / path.relative_to(package.path)
            if path.is_dir() and not path.is_symlink():
                copy.mkdir()
            else:
                copy_file(path, copy, folder=package.path, kind=PackageError)


def _fix_labels(done: Sequence[Edit], config: Path, package: Path) -> None:
    """Where a head got another number of outputs, the config's labels are those of another head."""
    widths = {
        edit.whole.value.shape[-1]
        for edit in done
        if edit.whole is not None
        and isinstance(edit.whole.weight.role, LinearWeight)
        and edit.whole.weight.module.rpartition(".")[2] not in VOCABULARY_HEADS
        and edit.whole.part.stored.shape[0 if edit.whole.part.transposed else 1] != edit.whole.value.shape[-1]
    }
    if not widths or not config.is_file():
        return
    content = parse_json(config.read_bytes(), package / config.name, PackageError, what="a config")
    content = {key: value for key, value in content.items() if key not in ("id2label", "label2id", "num_labels")}
    if len(widths) == 1:
        content["num_labels"] = widths.pop()
    config.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    _log.warning("%s: the head has another number of outputs; its labels were removed", config.name)
