"""Every error a user can meet, and nothing else.

    OnnxLoraError
    ├── InputError                   what was given is wrong; trying again will not help
    │   ├── ModelError               a checkpoint or graph that cannot be exported, or given points
    │   ├── PackageError             a package folder that is broken, incomplete or too new
    │   ├── AdapterError             an adapter that cannot be applied exactly
    │   │   ├── AdapterFileError         its files are damaged, hostile or not an adapter's
    │   │   │   └── SeveralAdaptersError     it holds several, and which is meant was not said
    │   │   ├── UnsupportedAdapterError  its method is known, and refused
    │   │   └── BindError                it does not fit this package
    │   ├── SelectionError           a call asks for an adapter, blend or row that cannot be had
    │   ├── FeedError                a call's inputs or outputs do not fit the graph
    │   ├── PromptError              a prompt that no text can be generated from
    │   ├── SamplingError            settings of a generation that contradict themselves
    │   ├── CacheError               a kept cache that this call must not go on with
    │   └── OutputExistsError        the output's place is taken
    ├── OutsideError                 the world failed; trying again may help
    │   ├── MissingDependencyError   an optional package is not installed
    │   ├── PluginError              a package that brings a format or a method is broken
    │   ├── StorageError             disk full, no permission, too many open files
    │   ├── ExportError              the exporter or ONNX Runtime failed on a file that looked right
    │   ├── RunError                 ONNX Runtime, memory or a helping process failed in a run whose inputs look right
    │   └── VerificationError        a package does not reproduce its reference
    └── InternalError                nobody foresaw it: a fault of this library, to be reported

A message says what must hold, what was found, and what to do. An error that found several
problems lists them, headed by the file's path. Names out of files are shown as `printable` makes them, and
foreign errors as `first_line` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from typing import Any

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "BindError",
    "CacheError",
    "ExportError",
    "FeedError",
    "InputError",
    "InternalError",
    "MissingDependencyError",
    "ModelError",
    "OnnxLoraError",
    "OutputExistsError",
    "OutsideError",
    "PackageError",
    "PluginError",
    "PromptError",
    "RunError",
    "SamplingError",
    "SelectionError",
    "SeveralAdaptersError",
    "StorageError",
    "UnsupportedAdapterError",
    "VerificationError",
    "first_line",
    "printable",
]

# Characters that steer a terminal or turn its text around, and halves of surrogate pairs, which cannot be written.
# Line breaks and tabs are not among them.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile(r"[\n\t]")

# What an error shows, in characters. A message is written by us and may list names out of a file; a problem is about
# one tensor or node. Together they fit a screen's scroll-back, whatever a file holds.
_MESSAGE_LIMIT = 4000
_PROBLEM_LIMIT = 1000
_SHOWN_PROBLEMS = 20

# A foreign error that says no more than this ("'key'", "0") is shown with its class.
_TELLING = 8  # characters

# What an error keeps for programs: 10 MB of the longest problems.
_KEPT_PROBLEMS = 10_000


def printable(text: str, limit: int = _MESSAGE_LIMIT, *, one_line: bool = False) -> str:
    """`text`, fit for a terminal: what would steer it is spelled out (`\\x1b`), and of more than `limit` characters
    the middle is left out. `one_line`: line breaks and tabs are spelled out, too."""
    if len(text) > limit:
        head, tail = text[: limit * 2 // 3], text[-(limit // 3) :]
        text = f"{head} … ({len(text) - len(head) - len(tail):,} characters) … {tail}"
    text = _STEERING.sub(_spelled, text)
    return _BREAKS.sub(_spelled, text) if one_line else text


def first_line(error: BaseException, limit: int = _PROBLEM_LIMIT) -> str:
    """What a foreign error, or its cause, says in its first line; with its class where it says next to nothing."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    said = printable(lines[0], limit) if lines else ""
    if len(said) > _TELLING:
        return said
    return f"{type(cause).__name__}: {said}" if said else type(cause).__name__


def _spelled(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class OnnxLoraError(Exception):
    """The root. `exit_code` is what the command line exits with.

    `problems` are what was found, one by one, the first ten thousand; `str()` shows twenty and says how many there
    are. `path` is as it was given.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str] | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.message = printable(message)
        self.path = None if path is None else str(path)
        self.problems = tuple(
            printable(problem, _PROBLEM_LIMIT, one_line=True) for problem in problems[:_KEPT_PROBLEMS]
        )
        lines = [f"  - {problem}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if len(problems) > _SHOWN_PROBLEMS:
            lines.append(f"  … and {len(problems) - _SHOWN_PROBLEMS:,} more")
        where = "" if self.path is None else f"{printable(self.path, _PROBLEM_LIMIT, one_line=True)}: "
        super().__init__("\n".join([f"{where}{self.message}", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        # From one process to another as it is; classes of exceptions are not called with what they were made of.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[OnnxLoraError], args: tuple[Any, ...], fields: dict[str, Any]) -> OnnxLoraError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class InputError(OnnxLoraError):
    """What was given is wrong."""

    exit_code = 2


class ModelError(InputError):
    """A checkpoint or an ONNX graph cannot be exported, or given injection points."""


class PackageError(InputError):
    """A package folder is broken, incomplete, or written by a newer version."""


class AdapterError(InputError):
    """An adapter cannot be applied exactly."""


class AdapterFileError(AdapterError):
    """An adapter's files are damaged, hostile, or not an adapter's."""


class SeveralAdaptersError(AdapterFileError):
    """A file or folder holds several adapters, and which is meant was not said. `names`: theirs."""

    def __init__(self, message: str, *, names: Sequence[str], path: str | PathLike[str] | None = None) -> None:
        super().__init__(message, path=path)
        self.names = tuple(names)


class UnsupportedAdapterError(AdapterError):
    """An adapter's method is known, and refused."""


class BindError(AdapterError):
    """An adapter does not fit this package."""


class SelectionError(InputError):
    """A call asks for an adapter, a blend or a row that cannot be had."""


class FeedError(InputError):
    """A call's inputs or outputs do not fit the graph."""


class PromptError(InputError):
    """A prompt is empty, too long, or cannot become tokens."""


class SamplingError(InputError):
    """Settings of a generation are out of range."""


class CacheError(InputError):
    """A kept cache is used up, or another adapter's, or another generator's."""


class OutputExistsError(InputError):
    """The place where something should be written is taken."""


class OutsideError(OnnxLoraError):
    """The world failed; the same call may work later, or elsewhere."""

    exit_code = 3


class MissingDependencyError(OutsideError):
    """An optional package is not installed; the message names the extra to install."""


class PluginError(OutsideError):
    """An installed package that brings a format or a method fails to load, or takes a name that is taken."""


class StorageError(OutsideError):
    """The disk is full, may not be written or read, or the system opens no more files."""


class ExportError(OutsideError):
    """An exporter or ONNX Runtime failed on a model that looked right."""


class RunError(OutsideError):
    """ONNX Runtime failed to start, or in a run whose inputs look right; or there is no memory for it, or no process
    can be started to render a chat template."""


class VerificationError(OutsideError):
    """A package does not give the numbers of its reference. `comparisons`: all that was compared, as
    `onnx_lora.verify` gives it; empty where it did not come to that."""

    exit_code = 4

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str] | None = None,
        problems: Sequence[str] = (),
        comparisons: Sequence[Any] = (),
    ) -> None:
        super().__init__(message, path=path, problems=problems)
        self.comparisons = tuple(comparisons)


class InternalError(OnnxLoraError):
    """Nobody foresaw this: a fault of this library. Please report it; `__cause__` has the traceback."""
