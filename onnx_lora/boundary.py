"""The one place where foreign exceptions become ours, on their way out of a public function. It knows exceptions, and
what the arguments of a call were meant to be; it knows nothing of what the functions do."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from onnx_lora.arguments import misfits
from onnx_lora.errors import (
    InputError,
    InternalError,
    MissingDependencyError,
    OnnxLoraError,
    OutsideError,
    StorageError,
    printable,
)
from onnx_lora.extras import how_to_install

__all__ = ["call_foreign", "public", "translated", "unread", "unwritten"]

R = TypeVar("R")
T = TypeVar("T", bound=Callable[..., Any])

# What the system refuses, by the kind of error, and what to do about it.
_FULL = (StorageError, "the disk is full; make room, or choose another place")
_FORBIDDEN = (StorageError, "the system does not permit it; change the permissions, or choose another place")
_REFUSED: Mapping[int, tuple[type[OnnxLoraError], str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: (
        StorageError,
        "a file would be larger than is allowed here; raise `ulimit -f`, or choose another disk",
    ),
    errno.EMFILE: (StorageError, "this process may open no more files; close some, or raise `ulimit -n`"),
    errno.ENFILE: (StorageError, "the system opens no more files; end other programs"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: (StorageError, "the disk can only be read; choose another place"),
    errno.ENOENT: (InputError, "there is no such file or folder; correct the path"),
    errno.ENOTDIR: (InputError, "a part of the path is a file, and must be a folder; correct the path"),
    errno.EISDIR: (InputError, "must be a file, and is a folder; correct the path"),
    errno.ELOOP: (InputError, "its links lead in a circle; correct them"),
    errno.ENAMETOOLONG: (InputError, "its name is longer than the file system takes; choose a shorter one"),
    errno.ENOMEM: (OutsideError, "memory ran out; end other programs, or take a smaller model"),
}

# Of these the path says nothing.
_LIMITS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_SAID_LIMIT = 500  # characters of a foreign message


def public(thing: T) -> T:
    """Mark a function, or all that is public of a class, as one that lets out nothing but `OnnxLoraError`.

    What passes: what ends the program (KeyboardInterrupt, SystemExit), the end of an iteration, what a function among
    the arguments raised (a `progress` that cancels), and a call that Python itself refuses, with arguments too many.
    """
    if isinstance(thing, type):
        _guard_class(thing)
        return cast(T, thing)
    return cast(T, _guarded(thing))


def unwritten(error: OSError, target: Path) -> StorageError:
    """What the disk refused of an output, to be raised from it."""
    if error.errno in _LIMITS:
        return StorageError(f"nothing was written: {_REFUSED[error.errno][1]}", path=target)
    found = ": ".join(filter(None, (error.strerror or str(error), _file_of(error))))
    return StorageError(f"cannot be written ({found}); nothing was written", path=target)


def unread(
    error: OSError | ValueError, path: str | os.PathLike[str], kind: type[OnnxLoraError], cure: str
) -> OnnxLoraError:
    """What is wrong with a file that was read, to be raised from `error`: a `kind` of error, unless the system is at
    fault and not the file."""
    if isinstance(error, OSError) and error.errno in (*_LIMITS, errno.EACCES, errno.EPERM, errno.EIO):
        return translated(error)
    what = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return kind(f"cannot be read: {what}; {cure}", path=path)


def call_foreign(function: Callable[[], R], failure: Callable[[str], OnnxLoraError]) -> R:
    """What another package's code gives, which may raise anything.

    Raises `failure(said)`: whatever it raised that is no error of ours; `said` has its type, its text and its line.
    StorageError: the disk is full, or the system opens no more files.
    """
    try:
        return function()
    except OnnxLoraError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LIMITS:  # the system's fault, and no package's
            raise translated(error) from error
        raise failure(_said(error)) from error


def translated(error: BaseException) -> OnnxLoraError:
    """A foreign exception as one of ours, to be raised from it."""
    if isinstance(error, OnnxLoraError):
        return error
    if isinstance(error, ModuleNotFoundError):
        cure = how_to_install(error.name or "")
        if cure is not None:
            return MissingDependencyError(f"this needs {error.name}; install it: {cure}")
    if isinstance(error, MemoryError):
        return OutsideError(_REFUSED[errno.ENOMEM][1])
    if isinstance(error, RecursionError):
        return InputError("what was given is nested too deeply to be worked on; make it flatter")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's, before Python 3.13
        return InputError(_REFUSED[errno.ELOOP][1])
    if isinstance(error, OSError):
        kind, cure = _REFUSED.get(error.errno or 0, (StorageError, f"the system failed: {error}; try again"))
        return kind(cure, path=_file_of(error))
    return InternalError(
        f"a fault of onnx-lora, or of a library beneath it ({_said(error)}); please report it, with the traceback"
    )


def _said(error: BaseException) -> str:
    """An exception's type and text, and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f", line {frame.lineno} of {Path(frame.filename).name}" for frame in last)
    return f"{type(error).__name__}: {printable(str(error), _SAID_LIMIT)}{where}"


def _file_of(error: OSError) -> str | None:
    """The path an error names; some name a descriptor."""
    named = error.filename
    return os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) and named else None


def _guard_class(kind: type) -> None:
    for name, value in list(vars(kind).items()):
        if name.startswith("_") and name not in ("__init__", "__iter__", "__next__", "__enter__", "__exit__"):
            continue
        if isinstance(value, staticmethod | classmethod):
            setattr(kind, name, type(value)(_guarded(value.__func__)))
        elif isinstance(value, property):
            setattr(kind, name, property(value.fget and _guarded(value.fget), value.fset, value.fdel, value.__doc__))
        elif isinstance(value, cached_property):
            value.func = _guarded(value.func)
        elif inspect.isfunction(value):
            setattr(kind, name, _guarded(value))


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isgeneratorfunction(function):
        raise TypeError(f"{function.__qualname__}: give out an iterator whose __next__ is public, not a generator")

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (OnnxLoraError, StopIteration):
            raise
        except BaseException as error:
            if _passes(error, args, kwargs):
                raise
            raise _judged(error, function, args, kwargs) from error

    return guarded


def _passes(error: BaseException, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    # A panic of Rust's in tokenizers or safetensors is no Exception, and no wish to end the program either.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return True
    trace = error.__traceback__
    if trace is None or trace.tb_next is None:
        return isinstance(error, TypeError)  # it never came into the function: Python refused the call
    theirs = {value.__code__ for value in (*args, *kwargs.values()) if hasattr(value, "__code__")}
    return any(frame.f_code in theirs for frame, _ in traceback.walk_tb(trace))


def _judged(
    error: BaseException, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> OnnxLoraError:
    """A failure that nobody foresaw is the caller's where an argument is not what it must be. Judged only now: a call
    that works pays nothing for it, and whatever behaves like what is asked for is taken."""
    mine = translated(error)
    if isinstance(error, MemoryError) or not (problems := misfits(function, args, kwargs)):
        return mine
    return InputError(f"{function.__qualname__} cannot work with its arguments", problems=problems)
