"""Outputs that appear whole or not at all, and what killed runs left behind. It knows folders, files and locks, and not
what is written.

A run works in a folder of its own beside its output, and holds a lock on a file in it for as long as it lives. Whoever
writes there next takes away the folders of this host whose lock is free: their runs are dead."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from onnx_lora.boundary import translate_unwritten
from onnx_lora.errors import OnnxLoraError, OutputExistsError, StorageError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing swept
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "exchanging", "put_over", "replacing", "scratch", "staged", "staged_place", "under_the_name"]

# Another host may share the disk and not its locks; it leaves alone what is not its own.
_HOST = sha256(platform.node().encode("utf-8", "replace")).hexdigest()[:8]
_OURS = f".onnx-lora-{_HOST}-"
_LOCK, _FILES = "lock", "files"


@contextmanager
def staged_place(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A free path of the same name, in a folder of this run. What the block makes there, a file or a folder, becomes
    `out` when the block ends well; if not, nothing remains, nor new folders around it.

    Raises OutputExistsError: `out` exists, or another process made it meanwhile. StorageError: it cannot be written.
    """
    target = Path(out)
    new: list[Path] = []
    try:
        _refuse_taken(target)
        new = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(target.parent) as folder:
            place = folder / target.name
            yield place
            _put(place, target)
            new = []
    except OSError as error:
        if not _is_of(error, target):
            raise
        raise translate_unwritten(error, target) from error
    finally:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def staged(out: str | os.PathLike[str]) -> Iterator[Path]:
    """As `staged_place`, of a folder that is there already. What lies beside it vanishes with the run."""
    with staged_place(out) as folder:
        folder.mkdir()
        yield folder


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A free path beside `file`. The file that the block writes there takes the place of `file` when the block ends
    well, at once: whoever reads finds the old one or the new one, whole.

    Raises StorageError: it cannot be written, and the old one is as it was.
    """
    try:
        with scratch(file.parent) as folder:
            place = folder / file.name
            yield place
            place.replace(file)
    except OSError as error:
        if not _is_of(error, file):
            raise
        raise translate_unwritten(error, file) from error


@contextmanager
def exchanging(target: Path) -> Iterator[Path]:
    """A free path beside `target`, a file or a folder that is there. What the block makes there takes its place when
    the block ends well; if not, the old one is as it was.

    A folder takes the place of another in two steps. Killed between them, the old one lies beside it, its name ended
    with `.replaced`, and the next run takes nothing of it away.

    Raises StorageError: it cannot be written.
    """
    try:
        with scratch(target.parent) as folder:
            place = folder / target.name
            yield place
            if target.is_dir() and not target.is_symlink():
                _exchange(place, target)
            else:
                place.replace(target)
    except OSError as error:
        if not _is_of(error, target):
            raise
        raise translate_unwritten(error, target) from error


def _exchange(made: Path, target: Path) -> None:
    """Move a folder to the place of another one, which is removed then."""
    old = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".replaced", dir=target.parent))
    target.rename(old)  # onto an empty folder
    try:
        made.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def put_over(made: Path, target: Path, aside: Path) -> None:
    """Move what was made to the place of `target`, whatever is there. `aside`: a free path in a `scratch` of the same
    disk; a folder that is replaced goes there, and vanishes with it, even where the process is killed between the two
    steps that a folder takes.

    Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    is_there = target.exists() or target.is_symlink()
    if is_there and (made.is_dir() or target.is_dir()):
        target.rename(aside)
        try:
            made.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        return
    made.replace(target)


@contextmanager
def under_the_name(place: Path, target: Path) -> Iterator[None]:
    """Errors of the block that speak of `place`, where something is made, speak of `target`, which the user knows."""
    try:
        yield
    except OnnxLoraError as error:
        old, new = str(place), str(target)
        error.args = (str(error).replace(old, new),)
        error.message = error.message.replace(old, new)
        error.problems = tuple(problem.replace(old, new) for problem in error.problems)
        error.path = None if error.path is None else error.path.replace(old, new)
        raise


@contextmanager
def alone(lock: Path, what: str, *, path: Path) -> Iterator[None]:
    """A block that one process runs at a time: it holds the lock of the file `lock`, which stays. Where there are no
    locks it just runs.

    Raises StorageError of `path`: another process is in it; `what` is what it does. OSError: the file cannot be made.
    """
    file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(f"{what}; wait until it has ended", path=path) from error
            except OSError:
                pass  # a disk without locks
        yield
    finally:
        os.close(file)


@contextmanager
def scratch(parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A folder in `parent` (default: where the system keeps temporary files) that vanishes with the block, or, if the
    process is killed, when the next run makes one there."""
    place = Path(parent or tempfile.gettempdir())
    _sweep(place)
    folder, lock = _locked_folder(place)
    try:
        files = folder / _FILES
        files.mkdir()
        yield files
    finally:
        os.close(lock)
        _remove(folder)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_OURS, dir=parent))
        try:
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:
            continue  # swept before it was locked
        except OSError:
            folder.rmdir()
            raise
        _lock(lock, wait=True)
        if (folder / _LOCK).exists():
            return folder, lock
        # A sweeper had the lock first, and removed the folder.
        os.close(lock)


def _lock(file: int, *, wait: bool) -> bool:
    """Whether the lock is had now; not on systems and disks without locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sweep(parent: Path) -> None:
    """Take away what dead runs of this user left in `parent`. What cannot be looked at is left alone."""
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if fcntl is not None and entry.name.startswith(_OURS) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _sweep_one(Path(entry.path))


def _sweep_one(folder: Path) -> None:
    if folder.lstat().st_uid != os.geteuid():
        return
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        folder.rmdir()  # killed, or about to be locked, in which case its run makes another
        return
    try:
        if stat.S_ISREG(os.fstat(lock).st_mode) and _lock(lock, wait=False):
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """The lock last: of what cannot be removed now, the next run knows that it may."""
    with suppress(OSError):
        if (folder / _FILES).exists():
            shutil.rmtree(folder / _FILES)
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _refuse_taken(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise OutputExistsError("exists already; remove it or choose another name", path=target)


def _put(made: Path, target: Path) -> None:
    """Move an output to its place, where nothing of another process may be."""
    _refuse_taken(target)
    try:
        if made.is_dir():
            made.rename(target)  # refuses a folder that is not empty
        else:
            _put_file(made, target)
    except OSError as error:
        if target.exists() or target.is_symlink():
            raise OutputExistsError(
                "was made by another process meanwhile; remove it or choose another name", path=target
            ) from error
        raise


def _put_file(made: Path, target: Path) -> None:
    try:
        os.link(made, target)  # unlike a rename it never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        _refuse_taken(target)
        made.replace(target)


def _is_of(error: OSError, target: Path) -> bool:
    """Whether an error can be about the output: it names no file, or one of those that are written."""
    named = error.filename
    if not isinstance(named, str | bytes | os.PathLike):
        return True
    path, place = Path(os.fsdecode(named)).absolute(), target.absolute()
    ours = any(part.startswith(_OURS) for part in path.parts)
    return ours or path.is_relative_to(place) or place.is_relative_to(path)
