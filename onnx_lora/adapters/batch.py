"""Many adapters converted in one run, which can be stopped and begun again. It knows no format.

Beside its outputs it keeps, in a folder of records, what each was made of: what is up to date is not made again. The
same input gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onnx_lora.errors import (
    InputError,
    InternalError,
    OnnxLoraError,
    OutputExistsError,
    SeveralAdaptersError,
    StorageError,
)
from onnx_lora.json_file import read_json
from onnx_lora.staging import exchanging, replacing, scratch, staged_place
from onnx_lora.whatis import Thing, what_is

if TYPE_CHECKING:
    from onnx_lora.adapters.adapter import Adapter, BoundAdapter

__all__ = ["Conversion", "Converted", "Progress", "convert_folder", "digest_of"]

Progress = Callable[[str, int, int], object]

# Where the records lie, beside the outputs.
_RECORDS = ".converted"

# Files that may be adapters.
_ENDINGS = (".safetensors", ".gguf", ".onnx_adapter")


@dataclass(frozen=True)
class Converted:
    """What became of one adapter.

    `name`: what its output is called. `out`: the output. `state`: "written" now, "up to date" since an earlier run, or
    "failed", with the `error`. `adapter` and `bound`: as it was read and bound, where it was written now.
    """

    name: str
    source: Path
    out: Path
    state: Literal["written", "up to date", "failed"]
    error: OnnxLoraError | None = None
    adapter: Adapter | None = None
    bound: BoundAdapter | None = None


@dataclass(frozen=True)
class _Job:
    """An adapter to convert. `chosen`: which of several in its file or folder."""

    name: str
    source: Path
    chosen: str | None = None


@dataclass(frozen=True)
class _Record:
    """What an output was made of; `output`: the SHA-256 of itself."""

    source: str
    package: str
    format: str
    version: str
    output: str


@dataclass(frozen=True)
class Conversion:
    """How one adapter is converted. `format` and `ending`: of the outputs. `package`: the SHA-256 of the package's
    manifest, or nothing. `convert`: reads the adapter at a path (the one of several that the name says), and writes
    it."""

    format: str
    ending: str
    package: str
    convert: Callable[[Path, str | None, Path], tuple[Adapter, BoundAdapter | None]]


def convert_folder(folder: Path, out: Path, conversion: Conversion, progress: Progress) -> list[Converted]:
    """Convert what is in `folder` and not up to date in `out`. Raises StorageError: `out` cannot be written."""
    batch = _Batch(out, conversion)
    entries = [entry for entry in sorted(folder.iterdir()) if _may_be_adapter(entry)]
    for number, entry in enumerate(entries):
        progress(entry.name, number, len(entries))
        batch.convert_entry(entry, is_named_twice=sum(_name_of(other) == _name_of(entry) for other in entries) > 1)
    return batch.done


def _may_be_adapter(entry: Path) -> bool:
    if entry.name.startswith("."):
        return False
    if not entry.is_dir():
        return entry.suffix in _ENDINGS
    is_model = what_is(entry) in (Thing.PACKAGE, Thing.CHECKPOINT, Thing.PIPELINE, Thing.ONNX, Thing.GENAI)
    return not is_model and any(entry.iterdir())


def _name_of(entry: Path) -> str:
    return entry.name if entry.is_dir() else entry.stem


@dataclass(frozen=True)
class _Batch:
    """What all conversions of a run share. `done`: what became of those that are through."""

    out: Path
    conversion: Conversion
    done: list[Converted] = field(default_factory=list)

    def convert_entry(self, entry: Path, *, is_named_twice: bool) -> None:
        """Convert what an entry of the folder holds: an adapter, or several."""
        name = _name_of(entry)
        try:
            if is_named_twice or any(other.name == name for other in self.done):
                raise _taken(entry)
            self.done.append(self._convert(_Job(name, entry)))
        except SeveralAdaptersError as error:
            for own in error.names:
                self._try(_Job(f"{name}-{own}", entry, own))
        except OnnxLoraError as error:
            self._fail(_Job(name, entry), error)

    def _try(self, job: _Job) -> None:
        try:
            if any(other.name == job.name for other in self.done):
                raise _taken(job.source)
            self.done.append(self._convert(job))
        except OnnxLoraError as error:
            self._fail(job, error)

    def _fail(self, job: _Job, error: OnnxLoraError) -> None:
        """Note a failure and go on; a fault of ours ends the run."""
        is_of_output = isinstance(error, StorageError) and (error.path or "").startswith(str(self.out))
        if is_of_output or isinstance(error, InternalError):
            raise error
        self.done.append(Converted(job.name, job.source, self._target(job), "failed", error))

    def _target(self, job: _Job) -> Path:
        return self.out / f"{job.name}{self.conversion.ending}"

    def _convert(self, job: _Job) -> Converted:
        from onnx_lora import __version__

        target = self._target(job)
        known = self._read_record(target)
        wanted = _Record(
            source=f"{digest_of(job.source)} {job.chosen or ''}".rstrip(),
            package=self.conversion.package,
            format=self.conversion.format,
            version=__version__,
            output=known.output if known else "",
        )
        if known == wanted and target.exists() and digest_of(target) == wanted.output:
            return Converted(job.name, job.source, target, "up to date")
        self.out.mkdir(parents=True, exist_ok=True)
        with scratch(self.out) as folder:
            made = folder / target.name
            adapter, bound = self.conversion.convert(job.source, job.chosen, made)
            digest = digest_of(made)
            if target.exists():
                self._replace(made, target, digest, is_ours=known is not None)
            else:
                with staged_place(target) as place:
                    made.rename(place)
        self._write_record(target, replace(wanted, output=digest))
        return Converted(job.name, job.source, target, "written", adapter=adapter, bound=bound)

    def _replace(self, made: Path, target: Path, digest: str, *, is_ours: bool) -> None:
        """Put an output in the place of an older one. Raises OutputExistsError: that is somebody else's."""
        if digest_of(target) == digest:
            return  # of a run that was stopped before it wrote its record
        if not is_ours:
            raise OutputExistsError("exists already, and no run of this command wrote it; remove it", path=target)
        with exchanging(target) as place:
            made.rename(place)

    def _read_record(self, target: Path) -> _Record | None:
        """What an earlier run noted of an output; None: nothing that can be read."""
        file = self._record(target)
        if not file.is_file():
            return None
        try:
            return _Record(**read_json(file, InputError, what="a record"))
        except (OnnxLoraError, TypeError):
            return None

    def _write_record(self, target: Path, record: _Record) -> None:
        file = self._record(target)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as place:
            place.write_text(json.dumps(asdict(record), indent=1, sort_keys=True) + "\n", "utf-8")

    def _record(self, target: Path) -> Path:
        return self.out / _RECORDS / f"{target.name}.json"


def _taken(source: Path) -> InputError:
    return InputError("another adapter of this folder would be written to the same place; rename one", path=source)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of all files below a folder with their names."""
    whole = sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        whole.update(file.relative_to(path).as_posix().encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            content = sha256()
            while piece := opened.read(2**20):
                content.update(piece)
        whole.update(content.digest())
    return whole.hexdigest()
