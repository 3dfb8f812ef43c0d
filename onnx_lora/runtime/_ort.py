"""ONNX Runtime as the runtime uses it: sessions, their options, and values on their device. It knows nothing of
adapters; `onnxruntime_errors` knows what fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np

from onnx_lora.errors import InputError, RunError
from onnx_lora.onnxruntime_errors import fail_as, fail_to_start, load_onnxruntime
from onnx_lora.points import Array

ort = load_onnxruntime("running a package needs")

__all__ = [
    "CPU",
    "Device",
    "Options",
    "Providers",
    "copy_options",
    "make_fed_value",
    "ort",
    "start_session",
]

# What ONNX Runtime's sessions take for `providers`.
Providers = Sequence[str | tuple[str, dict[Any, Any]]]

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

    def silence(self) -> Options:
        """The same with session options: the caller's, or ones that log errors only.

        Raises InputError: the caller's are something else.
        """
        if self.sess_options is not None:
            _check_options(self.sess_options)
            return self
        quiet = ort.SessionOptions()
        quiet.log_severity_level = _ERRORS_ONLY
        return replace(self, sess_options=quiet)


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
        """OrtValues by name. Raises RunError: there is no room for them."""
        with fail_as(lambda said: RunError(f"the adapter's tensors cannot be put on {self.kind}: {said}")):
            return {name: self.value(tensor) for name, tensor in tensors.items()}


CPU = Device("cpu")


def make_fed_value(fed: Any, element: int) -> Any:
    """A model's input as an OrtValue over the same memory, on the CPU; an OrtValue is taken as it is.

    `element`: its type's number in ONNX. A quarter of the time that the other constructor takes; this one
    reads the memory in C order, whatever the strides.
    """
    if isinstance(fed, ort.OrtValue):
        return fed
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(fed, order="C"), element)


def start_session(
    model: PathLike[str] | bytes, options: Options, *, path: PathLike[str] | None, kind: Any = None
) -> Any:
    """A session over `model`, a file or the bytes of one; `path` heads the errors. `kind` makes it, in place of
    `onnxruntime.InferenceSession`.

    It plans no reuse of memory ahead: ONNX Runtime compares every value with all buffers that are free, and those of
    the points' ranks, each a symbol of its own, fit no other value. With 1000 points that took 15 seconds, and its
    arena hands the same memory on as the graph runs: the peaks measured were equal.

    Raises PackageError: ONNX Runtime cannot open the model. InputError: no such providers or options.
    RunError: a provider failed to start.
    """
    make = kind or ort.InferenceSession
    with fail_to_start(path), _changed(options.sess_options, enable_mem_reuse=False):
        return make(
            model if isinstance(model, bytes) else str(model),
            options.sess_options,
            providers=options.providers,
            provider_options=options.provider_options,
            # Fallback prints, and goes on without the provider that was asked for.
            enable_fallback=0,
        )


def copy_options(given: Any) -> Any:
    """A copy of session options that may be changed; the ones given stay as they are.

    Raises InputError: they carry execution providers, which a copy would lose.
    """
    if given is None:
        return ort.SessionOptions()
    _check_options(given)
    if given.has_providers():
        raise InputError("sess_options must not carry providers of their own here; give them as providers=...")
    # These two would make the session write files.
    with _changed(given, enable_profiling=False, optimized_model_filepath=""):
        session = start_session(_IDENTITY, Options(("CPUExecutionProvider",), None, given), path=None)
    copy = session.get_session_options()
    copy.enable_profiling = given.enable_profiling
    copy.optimized_model_filepath = given.optimized_model_filepath
    return copy


def _check_options(options: Any) -> None:
    if not isinstance(options, ort.SessionOptions):
        raise InputError(f"sess_options must be an onnxruntime.SessionOptions, and is a {type(options).__name__}")


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
