"""Every adapter of a folder, converted into another folder: what is there and up to date stays, and one that fails
leaves the others alone. It knows how outputs take their places, and no format."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from onnx_lora.adapters.adapter import BoundAdapter
from onnx_lora.adapters.batch.records import FOLDER, Effect, MadeOf, Record, Records, digest_of
from onnx_lora.boundary import public, translate_unread, translate_unwritten
from onnx_lora.errors import AdapterFileError, InputError, OnnxLoraError, OutputExistsError
from onnx_lora.staging import alone, put_over, scratch, under_the_name
from onnx_lora.whatis import Thing, what_is

if TYPE_CHECKING:
    from onnx_lora.adapters.adapter import Adapter
    from onnx_lora.adapters.batch.collection import Collection, FoundAdapter

__all__ = ["Converted", "ConvertedFolder", "Progress", "Recipe", "check_places", "convert_collection"]

Progress = Callable[[str, int, int], object]

# What no name of a file may hold on some system, or leads elsewhere.
_NO_NAME = frozenset('/\\:\0<>"|?*')


@public
@dataclass(frozen=True)
class Converted:
    """What became of one adapter.

    `name`: what its output is called, "team/sql". `source`: its file or folder; `chosen`: which one there, where that
    holds several. `out`: the output. `state`: "written" now; "up to date" since an earlier run; "failed", with the
    `error`, and then `keeps_older` says whether an older output is still there. `sha256` and `size_bytes`: of the
    output, where there is one. `effect`: what the adapter does to the package, if there is one.
    """

    name: str
    source: Path
    chosen: str | None
    out: Path
    state: Literal["written", "up to date", "failed"]
    notes: Sequence[str] = ()
    sha256: str | None = None
    size_bytes: int | None = None
    effect: Effect | None = None
    error: OnnxLoraError | None = None
    keeps_older: bool = False


@public
@dataclass(frozen=True)
class ConvertedFolder:
    """What became of a folder of adapters.

    `adapters`: all of them, in the order of their places. `passed_over`: what is no adapter, by its place, and what it
    is. `left_over`: outputs of earlier runs whose adapter is gone; they stay.
    """

    adapters: Sequence[Converted]
    passed_over: Mapping[str, str]
    left_over: Sequence[Path]

    @property
    def failed(self) -> Sequence[Converted]:
        """The adapters that were not written."""
        return [adapter for adapter in self.adapters if adapter.state == "failed"]


@dataclass(frozen=True)
class Recipe:
    """How every adapter of a folder is converted. `ending`: of the outputs. `conditions`: what they are made of, but
    for the adapter. `write`: reads an adapter, writes it to a path, and gives what was written."""

    ending: str
    conditions: MadeOf
    write: Callable[[FoundAdapter, Path], Adapter | BoundAdapter]


def convert_collection(collection: Collection, out: Path, recipe: Recipe, progress: Progress) -> ConvertedFolder:
    """Convert what is not up to date in the folder `out`. Raises StorageError: it cannot be written, or another run
    converts into it."""
    maker = _Maker(out, recipe)
    places = _name_outputs(collection.found, recipe.ending)
    converted: list[Converted] = []
    with _working_in(out) as work:
        for adapter in collection.found:
            progress(adapter.inside, len(converted), len(collection.found))
            converted.append(maker.convert(adapter, places[adapter], work))
        left_over = maker.find_left_over(collection.found)
    return ConvertedFolder(converted, collection.passed_over, left_over)


def check_places(source: Path, target: Path) -> None:
    """Raises InputError: one folder lies in the other, or `target` is a file."""
    here, there = source.resolve(), target.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise InputError(f"must lie beside the folder of adapters ({source}), not in it or around it", path=target)
    if target.exists() and not target.is_dir():
        raise InputError("must be a folder for the outputs, and is a file; choose another name", path=target)


@contextmanager
def _working_in(target: Path) -> Iterator[Path]:
    """A folder for what is not whole yet, on the disk of `target`, where no other run writes meanwhile."""
    try:
        (target / FOLDER).mkdir(parents=True, exist_ok=True)
        lock = target / FOLDER / "lock"
        with alone(lock, "another run converts adapters into it", path=target), scratch(target) as work:
            yield work
    except OSError as error:
        raise translate_unwritten(error, target) from error


def _name_outputs(found: Sequence[FoundAdapter], ending: str) -> Mapping[FoundAdapter, str | InputError]:
    """Where each adapter is written, seen from the folder of outputs; or why it cannot be."""
    outputs = {adapter: f"{adapter.stem}{ending}" for adapter in found}
    takers: dict[PurePosixPath, list[FoundAdapter]] = {}
    for adapter, output in outputs.items():
        takers.setdefault(_as_any_disk_sees(output), []).append(adapter)
    named: dict[FoundAdapter, str | InputError] = {}
    for adapter, output in outputs.items():
        place = _as_any_disk_sees(output)
        rivals = [one for one in takers[place] if one is not adapter]
        for other, owners in takers.items():
            if place in other.parents or other in place.parents:
                rivals.extend(owners)
        named[adapter] = _refusal(adapter, output, rivals) or output
    return named


def _as_any_disk_sees(output: str) -> PurePosixPath:
    """The same for names that some disk takes for one: in other cases, or with accents composed otherwise."""
    return PurePosixPath(unicodedata.normalize("NFC", output).casefold())


def _refusal(adapter: FoundAdapter, output: str, rivals: Sequence[FoundAdapter]) -> InputError | None:
    if adapter.name is not None and (_NO_NAME & set(adapter.name) or not adapter.name.isprintable()):
        return InputError(
            f"the adapter {adapter.name!r} in it has a name that no file can have; save it in a folder of its own",
            path=adapter.path,
        )
    if rivals:
        others = " and ".join(sorted({rival.inside for rival in rivals}))
        return InputError(
            f"would be written to {output}, where {others} would go too; rename one of them", path=adapter.path
        )
    return None


@dataclass(frozen=True)
class _Maker:
    """Makes outputs in the folder `out`."""

    out: Path
    recipe: Recipe

    def convert(self, adapter: FoundAdapter, output: str | InputError, work: Path) -> Converted:
        """What becomes of an adapter. `output`: its place in `out`, or why it has none. `work`: a folder on the disk of
        `out`."""
        name, target = adapter.stem, self.out / (output if isinstance(output, str) else adapter.stem)
        try:
            if isinstance(output, InputError):
                raise output
            state, record = self._make(adapter, output, work / "adapter")
        except OnnxLoraError as error:
            has_older = isinstance(output, str) and Records(self.out).has(output) and os.path.lexists(target)
            return Converted(name, adapter.path, adapter.name, target, "failed", error=error, keeps_older=has_older)
        whole = record.output
        return Converted(
            name,
            adapter.path,
            adapter.name,
            target,
            state,
            record.notes,
            whole.sha256,
            whole.size_bytes,
            record.effect,
        )

    def _make(self, adapter: FoundAdapter, output: str, work: Path) -> tuple[Literal["written", "up to date"], Record]:
        """Write an adapter, unless it is there. `work`: a free path."""
        records, target = Records(self.out), self.out / output
        made_of = self._made_of(adapter)
        with _folder_at(work, target):
            known, there = records.read(output), digest_of(target)
            if known is not None and (known.made_of, known.output) == (made_of, there):
                return "up to date", known
            made = work / target.name
            with under_the_name(made, target):
                record = self._write(adapter, made, made_of)
            if there != record.output:
                self._refuse_others(target, output)
            # Before the output takes its place: killed between the two, the next run sees that it is not whole.
            records.write(output, record)
            if there != record.output:
                put_over(made, target, work / "aside")
        return "written", record

    def _write(self, adapter: FoundAdapter, place: Path, made_of: MadeOf) -> Record:
        written = self.recipe.write(adapter, place)
        digest = digest_of(place)
        assert digest is not None, "a format writes what it was asked for"
        if isinstance(written, BoundAdapter):
            return Record(made_of, digest, written.coverage.notes, Effect.of(written))
        return Record(made_of, digest, written.notes)

    def _made_of(self, adapter: FoundAdapter) -> MadeOf:
        """Raises AdapterFileError: the adapter cannot be read, or is gone."""
        try:
            source = digest_of(adapter.path)
        except OSError as error:
            raise translate_unread(error, adapter.path, AdapterFileError, "let it be read") from error
        if source is None:
            raise AdapterFileError("must be a file or a folder, and is neither, or gone", path=adapter.path)
        return replace(self.recipe.conditions, adapter=adapter.inside, name=adapter.name, sha256=source.sha256)

    def _refuse_others(self, target: Path, output: str) -> None:
        """Raises OutputExistsError: no run of ours wrote what is at an output's place, or it is no adapter now."""
        if not os.path.lexists(target):
            return
        there = what_is(target)
        if there not in (Thing.ADAPTER, Thing.FILE, Thing.NOTHING):
            raise OutputExistsError(f"must be free for an adapter, and there is {there.value}; remove it", path=target)
        if not Records(self.out).has(output):
            raise OutputExistsError("exists already, and no earlier run wrote it; remove it", path=target)

    def find_left_over(self, found: Sequence[FoundAdapter]) -> list[Path]:
        """Outputs of earlier runs whose adapter is not among `found`."""
        here = {(adapter.inside, adapter.name) for adapter in found}
        left: list[Path] = []
        records = Records(self.out)
        for output in records.outputs():
            record = records.read(output)
            is_gone = record is not None and (record.made_of.adapter, record.made_of.name) not in here
            if is_gone and os.path.lexists(self.out / output):
                left.append(self.out / output)
        return left


@contextmanager
def _folder_at(work: Path, target: Path) -> Iterator[None]:
    """`work` is a folder for as long as the block runs; what the disk refuses is an error of `target`."""
    try:
        work.mkdir()
        yield
    except OSError as error:
        raise translate_unwritten(error, target) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
