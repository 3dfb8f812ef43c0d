"""Which adapters lie in a folder, and what each of them is called. It reads no more than it takes to recognise them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.formats.registry import find_format, format_names, recognise
from onnx_lora.boundary import translate_unread
from onnx_lora.errors import AdapterFileError, InputError, OnnxLoraError
from onnx_lora.whatis import Thing, what_is

__all__ = ["Collection", "FoundAdapter", "find_adapters"]

# Files of weights, besides those of our formats: one that cannot be read is a broken adapter, and no other file.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")

# Folders with files of weights that are no adapters.
_OTHER_FOLDERS = (Thing.PACKAGE, Thing.CHECKPOINT, Thing.PIPELINE, Thing.GENAI)


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter in a folder of them, readable or not."""

    path: Path
    inside: str  # the same, seen from the folder of adapters: "team/sql.safetensors"
    stem: str  # what is made of it is called so: "team/sql"
    name: str | None = None  # chooses it, where its file or folder holds several


@dataclass
class Collection:
    """What lies in a folder of adapters. `passed_over`: what is no adapter, by its place, and what it is."""

    found: list[FoundAdapter] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)


def find_adapters(folder: Path) -> Collection:
    """The adapters at any depth of `folder`, in the order of their names, or the one that it is. Names that begin with
    a dot are not looked at, and in an adapter's own folder nothing but what its format says.

    Raises InputError: there is no such folder. AdapterFileError: a folder cannot be read.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise InputError(f"must be a folder of adapters, and is {found}", path=folder)
    collection = Collection()
    names = _names_at(folder)
    if names:
        _add(collection, folder, PurePosixPath(folder.resolve().name), names)
    else:
        _look_into(folder, PurePosixPath(), (folder.resolve(),), collection)
    return collection


def _look_into(folder: Path, inside: PurePosixPath, above: Sequence[Path], collection: Collection) -> None:
    """`above`: the folders on the way here; a link to one of them has no end."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise translate_unread(error, folder, AdapterFileError, "let it be read") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        place = inside / entry.name
        names = _names_at(entry)
        if names:
            _add(collection, entry, place, names)
        elif not entry.is_dir() or what_is(entry) in _OTHER_FOLDERS:
            collection.passed_over[str(place)] = what_is(entry).value
        elif entry.resolve() in above:
            collection.passed_over[str(place)] = "a link to a folder above it"
        else:
            _look_into(entry, place, (*above, entry.resolve()), collection)


def _names_at(path: Path) -> Sequence[str | None]:
    """The names of the adapters at a path, None for one without; none where there is no adapter. What is broken is one
    adapter: whoever reads it says what is wrong."""
    try:
        with Place.open(path) as place:
            format = recognise(place)
            if not format.recognises(place):  # the one that speaks for any folder
                return (None,) if what_is(path) is Thing.ADAPTER else ()
            return format.names(place)
    except AdapterFileError:
        return (None,) if _looks_like_an_adapter(path) else ()
    except OnnxLoraError:
        return (None,)


def _looks_like_an_adapter(path: Path) -> bool:
    return what_is(path) is Thing.ADAPTER or (not path.is_dir() and path.suffix in _endings())


def _endings() -> frozenset[str]:
    """How the names of files of weights end."""
    return frozenset([*_WEIGHTS, *_endings_of_formats().values()]) - {""}


def _endings_of_formats() -> Mapping[str, str]:
    return {name: find_format(name).ending for name in format_names()}


def _add(collection: Collection, path: Path, inside: PurePosixPath, names: Sequence[str | None]) -> None:
    is_ended = not path.is_dir() and inside.suffix in _endings()
    stem = str(inside.with_suffix("") if is_ended else inside)
    for name in names:
        own = stem if name is None else f"{stem}-{name}"
        collection.found.append(FoundAdapter(path, str(inside), own, name))
