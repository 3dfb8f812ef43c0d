"""The files of a model's folder, and which of them may be read and copied. It knows links and special files, and no
format."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from onnx_lora.errors import InputError

__all__ = ["check_folder", "copy_file", "leads_out"]

# How deep the files of a model lie: a pipeline has a folder for each of its parts.
_DEPTH = 2


def check_folder(
    folder: Path, kind: type[InputError], *, depth: int = _DEPTH, patterns: Sequence[str] = ("*",)
) -> None:
    """Check that a library can read `folder` to its end.

    depth: how many levels of folders it reads. patterns: the names that it reads.

    Raises `kind`: a pipe, a device or a socket is among them.
    """
    special: list[str] = []
    for entry in _entries(folder, depth):
        is_read = any(fnmatch(entry.name, pattern) for pattern in patterns)
        if is_read and _is_special(entry):
            special.append(str(entry.relative_to(folder)))
    if special:
        raise kind(
            "must hold files and folders alone; remove what is a pipe, a device or a socket",
            path=folder,
            problems=special,
        )


def _entries(folder: Path, depth: int) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        yield entry
        if depth > 1 and entry.is_dir() and not entry.is_symlink():
            yield from _entries(entry, depth - 1)


def _is_special(entry: Path) -> bool:
    return entry.exists() and not entry.is_file() and not entry.is_dir()


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a file of `folder` is a link to elsewhere. The hub's cache is one place: a snapshot's files are links to
    the blobs beside it."""
    target, root = file.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return False
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            return target.parent != place.parent.parent / "blobs"
    return True


def copy_file(file: Path, target: Path, *, folder: Path, kind: type[InputError]) -> None:
    """Copy a file of `folder`. Raises `kind`: it is a link out of the folder, is no file, or `target` is taken."""
    if leads_out(file, folder):
        raise kind(f"is a link out of its folder (to {file.resolve()}); put a copy there", path=file)
    if not file.is_file():
        raise kind("must be a file, and is none; remove it", path=file)
    if target.exists():
        raise kind(f"has the name of a file that is written ({target.name}); rename it", path=file)
    shutil.copyfile(file, target)
