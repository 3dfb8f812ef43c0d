"""The one place where foreign exceptions become ours, on their way out of a public function. It knows exceptions, and
asks `arguments` whether a call's arguments fit; it does not know what the functions do."""

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

from onnx_lora.arguments import find_misfits
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

__all__ = ["call_foreign", "public", "translate", "translate_unread", "translate_unwritten"]

R = TypeVar("R")
T = TypeVar("T", bound=Callable[..., Any])

# By the number of a system's error: which error of ours it is, and what is wrong and what to do.
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

# A limit of the process, the disk or the machine was reached: the file that is named is not at fault.
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
    return cast(T, _guard(thing))


def translate_unwritten(error: OSError, target: Path) -> StorageError:
    """The error of an output that the disk refused, to be raised from `error`."""
    if error.errno in _LIMITS:
        return StorageError(f"nothing was written: {_REFUSED[error.errno][1]}", path=target)
    found = error.strerror or str(error)
    file = _file_of(error)
    if file is not None:
        found += f": {file}"
    return StorageError(f"cannot be written ({found}); nothing was written", path=target)


def translate_unread(
    error: OSError | ValueError, path: str | os.PathLike[str], kind: type[OnnxLoraError], cure: str
) -> OnnxLoraError:
    """The error of a file that cannot be read, to be raised from `error`: a `kind`, which says `cure`, where the file
    is at fault; a StorageError where the system is."""
    if isinstance(error, OSError) and error.errno in (*_LIMITS, errno.EACCES, errno.EPERM, errno.EIO):
        return translate(error)
    reason = error.strerror if isinstance(error, OSError) else None
    return kind(f"cannot be read: {reason or error}; {cure}", path=path)


def call_foreign(function: Callable[[], R], failure: Callable[[str], OnnxLoraError]) -> R:
    """Call a function of another package, which may raise anything.

    Raises `failure(said)` in place of every exception that is not ours; `said` has its type, its text and its line.
    StorageError: the disk is full, or the system opens no more files.
    """
    try:
        return function()
    except OnnxLoraError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LIMITS:  # the system's fault, and no package's
            raise translate(error) from error
        raise failure(_describe(error)) from error


def translate(error: BaseException) -> OnnxLoraError:
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
        f"a fault of onnx-lora, or of a library beneath it ({_describe(error)}); please report it, with the traceback"
    )


def _describe(error: BaseException) -> str:
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
            setattr(kind, name, type(value)(_guard(value.__func__)))
        elif isinstance(value, property):
            getter = value.fget and _guard(value.fget)
            setattr(kind, name, property(getter, value.fset, value.fdel, value.__doc__))
        elif isinstance(value, cached_property):
            value.func = _guard(value.func)
        elif inspect.isfunction(value):
            setattr(kind, name, _guard(value))


def _guard(function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isgeneratorfunction(function):
        raise TypeError(f"{function.__qualname__}: give out an iterator whose __next__ is public, not a generator")

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (OnnxLoraError, StopIteration):
            raise
        except BaseException as error:
            if _may_pass(error, args, kwargs):
                raise
            raise _judge(error, function, args, kwargs) from error

    return guarded


def _may_pass(error: BaseException, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    # A panic of Rust's in tokenizers or safetensors is no Exception, and no wish to end the program either.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return True
    trace = error.__traceback__
    if trace is None or trace.tb_next is None:
        return isinstance(error, TypeError)  # it never came into the function: Python refused the call
    theirs = {value.__code__ for value in (*args, *kwargs.values()) if hasattr(value, "__code__")}
    return any(frame.f_code in theirs for frame, _ in traceback.walk_tb(trace))


def _judge(
    error: BaseException, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> OnnxLoraError:
    """The error of a call that failed for a reason that nobody foresaw: the caller's where an argument is of another
    type than its annotation. Arguments are checked only now, so that a call that works pays nothing for it, and an
    object that behaves like what is asked for is taken."""
    if not isinstance(error, MemoryError):
        problems = find_misfits(function, args, kwargs)
        if problems:
            return InputError(f"{function.__qualname__} cannot work with its arguments", problems=problems)
    return translate(error)
