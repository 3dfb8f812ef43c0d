"""The boundary to ONNX Runtime: importing it, starting sessions, and its exceptions in our words. It
knows nothing of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from onnx_lora.errors import FeedError, InputError, MissingDependencyError, PackageError, RunError
from onnx_lora.points import Array

try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as _native
except ImportError as error:
    raise MissingDependencyError(
        "running a package needs ONNX Runtime, and it cannot be imported; "
        "install it: pip install onnx-lora[cpu], or onnx-lora[gpu] for CUDA (one of them, never both)"
    ) from error

__all__ = ["CPU", "Device", "Options", "Providers", "fed_value", "ort", "own_options", "running", "start"]

# What ONNX Runtime's sessions take for `providers`.
Providers = Sequence[str | tuple[str, dict[Any, Any]]]

# ONNX Runtime's own exceptions have no common root but Exception.
_NATIVE: tuple[type[Exception], ...] = tuple(
    kind for kind in vars(_native).values() if isinstance(kind, type) and issubclass(kind, Exception)
)
# pybind turns what is not ONNX Runtime's own into these.
_FAILURES: tuple[type[Exception], ...] = (*_NATIVE, RuntimeError, ValueError, TypeError, MemoryError)

# Severity 3 is ERROR. At WARNING, ONNX Runtime writes one line for every optional input.
_ERRORS_ONLY = 3

# An ONNX model that hands one float on: enough to start a session with.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@dataclass(frozen=True, slots=True)
class Options:
    """What a session is started with, as `onnxruntime.InferenceSession` takes it."""

    providers: Providers | None = None
    provider_options: Sequence[dict[Any, Any]] | None = None
    sess_options: Any = None

    def quiet(self) -> Any:
        """The caller's session options, or ones that log errors only.

        Raises InputError: they are something else.
        """
        if self.sess_options is not None:
            return _checked(self.sess_options)
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        return options


@dataclass(frozen=True, slots=True)
class Device:
    """Where a session keeps its inputs."""

    kind: str  # "cpu" or "cuda", as OrtValue takes it
    index: int = 0

    @staticmethod
    def of(session: Any) -> Device:
        """The device of a session's first provider."""
        if session.get_providers()[:1] != ["CUDAExecutionProvider"]:
            return CPU
        settings = session.get_provider_options().get("CUDAExecutionProvider", {})
        return Device("cuda", int(settings.get("device_id", 0)))

    def value(self, array: Array) -> Any:
        """An OrtValue: on the CPU over the array itself, which it keeps alive, else a copy."""
        return ort.OrtValue.ortvalue_from_numpy(array, self.kind, self.index)

    def values(self, tensors: Mapping[str, Array]) -> dict[str, Any]:
        try:
            return {name: self.value(tensor) for name, tensor in tensors.items()}
        except _FAILURES as error:
            raise RunError(f"the adapter's tensors cannot be put on {self.kind}: {_first_line(error)}") from error


CPU = Device("cpu")


def fed_value(fed: Any, element: int) -> Any:
    """A model's input as an OrtValue over the same memory, on the CPU; an OrtValue is taken as it is.

    `element`: its type's number in ONNX. A quarter of the time that the other constructor takes; this one
    reads the memory in C order, whatever the strides.
    """
    if isinstance(fed, ort.OrtValue):
        return fed
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(fed, order="C"), element)


def start(model: PathLike[str] | bytes, options: Options, *, path: PathLike[str] | None, kind: Any = None) -> Any:
    """A session over `model`, a file or the bytes of one; `path` heads the errors.

    It plans no reuse of memory ahead: ONNX Runtime compares every value with all buffers that are free, and those of
    the points' ranks, each a symbol of its own, fit no other value. With 1000 points that took 15 seconds, and its
    arena hands the same memory on as the graph runs: the peaks measured were equal.

    Raises PackageError: ONNX Runtime cannot open the model. InputError: no such providers or options.
    RunError: a provider failed to start.
    """
    try:
        # Fallback prints, and goes on without the provider that was asked for.
        with _changed(options.sess_options, enable_mem_reuse=False):
            return (kind or ort.InferenceSession)(
                model if isinstance(model, bytes) else str(model),
                options.sess_options,
                providers=options.providers,
                provider_options=options.provider_options,
                enable_fallback=0,
            )
    except _NATIVE as error:
        raise PackageError(
            f"ONNX Runtime cannot open the graph; make the package again, or copy it again: {_first_line(error)}",
            path=path,
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"ONNX Runtime cannot start with these providers or options: {_first_line(error)}") from error
    except RuntimeError as error:
        raise RunError(f"ONNX Runtime cannot start: {_first_line(error)}", path=path) from error


@contextmanager
def running() -> Iterator[None]:
    """Around a run. Raises FeedError: ONNX Runtime refuses an argument. RunError: it failed."""
    try:
        yield
    except _native.InvalidArgument as error:
        raise FeedError(f"ONNX Runtime refuses the inputs; correct what it names: {_first_line(error)}") from error
    except _FAILURES as error:
        raise RunError(f"ONNX Runtime failed in the run: {_first_line(error)}") from error


def own_options(given: Any) -> Any:
    """A copy of session options that may be changed; the ones given stay as they are.

    Raises InputError: they carry execution providers, which a copy would lose.
    """
    if given is None:
        return ort.SessionOptions()
    if _checked(given).has_providers():
        raise InputError("sess_options must not carry providers of their own here; give them as providers=...")
    # These two would make the session write files.
    with _changed(given, enable_profiling=False, optimized_model_filepath=""):
        session = start(_IDENTITY, Options(("CPUExecutionProvider",), None, given), path=None)
    copy = session.get_session_options()
    copy.enable_profiling, copy.optimized_model_filepath = given.enable_profiling, given.optimized_model_filepath
    return copy


def _checked(options: Any) -> Any:
    if not isinstance(options, ort.SessionOptions):
        raise InputError(f"sess_options must be an onnxruntime.SessionOptions, and is a {type(options).__name__}")
    return options


@contextmanager
def _changed(options: Any, **values: Any) -> Iterator[None]:
    """Session options with other values for as long as a session starts, which copies them."""
    before = {name: getattr(options, name) for name in values if options is not None}
    try:
        for name in before:
            setattr(options, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(options, name, value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
