"""What earlier runs wrote into a folder, and what they made it of. It knows files and their digests, and no format.

A record is written before its output takes its place. So an output that has the digest of its record is whole and made
of what the record says; any other is to be made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lora.codec import Codec
from onnx_lora.errors import InputError
from onnx_lora.json_file import read_json
from onnx_lora.staging import replacing

if TYPE_CHECKING:
    from onnx_lora.adapters.adapter import BoundAdapter

__all__ = ["FOLDER", "Digest", "Effect", "MadeOf", "Record", "Records", "digest_of"]

# Of the records, in the folder of what was written.
FOLDER = ".conversions"

_CODEC = Codec({})


@dataclass(frozen=True)
class MadeOf:
    """All that decides about the bytes of an output, and about whether there is one."""

    format: str
    version: str  # of onnx-lora, and of who brings the format
    strict: bool
    allow_unproven: bool
    package: str | None = None  # the digest of the package's manifest, which has that of every weight
    adapter: str = ""  # its file or folder, seen from the folder of adapters
    sha256: str = ""  # of its files
    name: str | None = None  # which of several there


@dataclass(frozen=True)
class Digest:
    """What identifies a file's bytes, or a folder's files: `size_bytes` is of all of them."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Effect:
    """What an adapter does to a package: modules, and parameters that it replaces. `size_bytes`: of what it feeds."""

    applied: tuple[str, ...]
    replaced: tuple[str, ...]
    at_base: tuple[str, ...]  # modules with a point that it does not touch
    silent: tuple[str, ...]  # applied, and every B is zero
    fold_only: dict[str, str]  # modules, and why they cannot run unfolded
    size_bytes: int

    @classmethod
    def of(cls, bound: BoundAdapter) -> Effect:
        coverage = bound.coverage
        size = sum(tensor.nbytes for tensor in bound.tensors.values())
        return cls(
            coverage.applied, coverage.replaced, coverage.at_base, coverage.silent, dict(coverage.fold_only), size
        )


@dataclass(frozen=True)
class Record:
    """What was written, of what, and what a user should know of it. `effect`: on the package, if there was one."""

    made_of: MadeOf
    output: Digest
    notes: tuple[str, ...]
    effect: Effect | None = None


@dataclass(frozen=True)
class Records:
    """The records in the folder `out`, by the names of outputs there."""

    out: Path

    def read(self, output: str) -> Record | None:
        """The record of an output; None: there is none, or a damaged one."""
        file = self._file(output)
        try:
            data = read_json(file, InputError) if file.is_file() else None
            record: Record | None = None if data is None else _CODEC.decode(Record, data, "a record")
        except (InputError, ValueError):
            return None
        return record

    def has(self, output: str) -> bool:
        """Whether an earlier run wrote the output, or was about to."""
        return self._file(output).is_file()

    def write(self, output: str, record: Record) -> None:
        """Raises StorageError: the disk refuses it."""
        file = self._file(output)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as place:
            place.write_text(json.dumps(_CODEC.encode(record), indent=1, sort_keys=True) + "\n", "utf-8")

    def outputs(self) -> Iterator[str]:
        """The outputs of all runs."""
        folder = self.out / FOLDER
        for file in sorted(folder.rglob("*.json")):
            yield file.relative_to(folder).as_posix().removesuffix(".json")

    def _file(self, output: str) -> Path:
        return self.out / FOLDER / f"{output}.json"


def digest_of(path: Path) -> Digest | None:
    """The digest of a file, or of a folder's files with their names; None: there is neither. What is no regular file is
    left out, and nothing outside is followed to by links of folders.

    Raises OSError.
    """
    if path.is_file():
        return _digest_file(path)
    if not path.is_dir():
        return None
    total = hashlib.sha256()
    size = 0
    for file in sorted(path.rglob("*")):
        if file.is_file():
            own = _digest_file(file)
            size += own.size_bytes
            total.update(f"{file.relative_to(path).as_posix()}\n{own.sha256}\n".encode("utf-8", "surrogateescape"))
    return Digest(total.hexdigest(), size)


def _digest_file(path: Path) -> Digest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(digest, file.tell())
