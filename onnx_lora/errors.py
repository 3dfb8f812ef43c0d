"""Every error a user can meet, and nothing else.

    OnnxLoraError
    ├── InputError                   what was given is wrong; trying again will not help
    │   ├── ModelError               a checkpoint or graph that cannot be exported, or given points
    │   ├── PackageError             a package folder that is broken, incomplete or too new
    │   ├── AdapterError             an adapter that cannot be applied exactly
    │   │   ├── AdapterFileError         its files are damaged, hostile or not an adapter's
    │   │   ├── UnsupportedAdapterError  its method is known, and refused
    │   │   └── BindError                it does not fit this package
    │   ├── SelectionError           a call asks for an adapter, blend or row that cannot be had
    │   ├── FeedError                a call's inputs or outputs do not fit the graph
    │   ├── PromptError              a prompt that no text can be generated from
    │   ├── SamplingError            settings of a generation that contradict themselves
    │   ├── CacheError               a kept cache that this call must not go on with
    │   └── OutputExistsError        the output's place is taken
    └── OutsideError                 the world failed; trying again may help
        ├── MissingDependencyError   an optional package is not installed
        ├── StorageError             disk full, no permission
        ├── ExportError              the exporter or ONNX Runtime failed on a file that looked right
        ├── RunError                 ONNX Runtime, memory or a helping process failed in a run whose inputs look right
        └── VerificationError        a package does not reproduce its reference

A message says what must hold, what was found, and what to do. An error that found several
problems lists them all, headed by the file's path.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "BindError",
    "CacheError",
    "ExportError",
    "FeedError",
    "InputError",
    "MissingDependencyError",
    "ModelError",
    "OnnxLoraError",
    "OutputExistsError",
    "OutsideError",
    "PackageError",
    "PromptError",
    "RunError",
    "SamplingError",
    "SelectionError",
    "StorageError",
    "UnsupportedAdapterError",
    "VerificationError",
]


class OnnxLoraError(Exception):
    """The root. `exit_code` is what the command line exits with."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str] | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.message = message
        self.path = None if path is None else str(path)
        self.problems = tuple(problems)
        head = message if path is None else f"{self.path}: {message}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


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


class StorageError(OutsideError):
    """The disk is full, or may not be written."""


class ExportError(OutsideError):
    """An exporter or ONNX Runtime failed on a model that looked right."""


class RunError(OutsideError):
    """ONNX Runtime failed to start, or in a run whose inputs look right; or there is no memory for it, or no process
    can be started to render a chat template."""


class VerificationError(OutsideError):
    """A package does not give the numbers of its reference."""

    exit_code = 4
