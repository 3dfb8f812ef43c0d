"""ONNX Runtime from outside: importing it, and its exceptions in our words. This is the one file that catches them; it
knows no session, no graph and no adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from typing import Any

from onnx_lora.errors import (
    FeedError,
    InputError,
    MissingDependencyError,
    OnnxLoraError,
    PackageError,
    RunError,
    first_line,
)

__all__ = [
    "fail_as",
    "fail_in_run",
    "fail_to_start",
    "is_unsupported",
    "load_onnxruntime",
    "native_failures",
]

# Makes an error of ours out of what ONNX Runtime said.
Make = Callable[[str], OnnxLoraError]

# How ONNX Runtime says that it has no kernel for an operator, or does not know it.
_UNSUPPORTED = ("NOT_IMPLEMENTED", "is not a registered function/op")


def load_onnxruntime(need: str, *, part: str = "", extra: str = "cpu", path: str | PathLike[str] | None = None) -> Any:
    """The module `onnxruntime`, or its module `part` ("tools.symbolic_shape_infer").

    `need` begins the message, "running a package needs"; `extra` is what installs it all.

    Raises MissingDependencyError: ONNX Runtime, or a library that this part of it needs, is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"{need} ONNX Runtime, and it cannot be imported; install it: pip install 'onnx-lora[{extra}]', or "
            f"'onnx-lora[{extra.replace('cpu', 'gpu')}]' for CUDA (one of them, never both)",
            path=path,
        ) from error
    if not part:
        return onnxruntime
    try:
        return import_module(f"onnxruntime.{part}")
    except ImportError as error:
        # Some of its tools raise an error of their own, which names no module.
        missing = error.name or f"what ONNX Runtime's tool asks for ({first_line(error)})"
        raise MissingDependencyError(
            f"{need} {missing}; install it: pip install 'onnx-lora[{extra}]'", path=path
        ) from error


def native_failures() -> tuple[type[Exception], ...]:
    """ONNX Runtime's own exceptions, which have no common root but Exception; none where it is not installed."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as native
    except ImportError:
        return ()
    return tuple(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception))


def is_unsupported(error: BaseException) -> bool:
    """Whether ONNX Runtime refused a graph because of an operator or a type that it has no kernel for."""
    said = str(error)
    return any(phrase in said for phrase in _UNSUPPORTED)


@contextmanager
def fail_as(make: Make) -> Iterator[None]:
    """Around calls of ONNX Runtime. Raises what `make` gives for what it says: it failed, in whatever way."""
    try:
        yield
    except OnnxLoraError:
        raise
    except _all_failures() as error:
        raise make(first_line(error)) from error


@contextmanager
def fail_to_start(path: str | PathLike[str] | None) -> Iterator[None]:
    """Around the start of a session on the graph of a package; `path` heads the errors.

    Raises PackageError: ONNX Runtime cannot open the graph. InputError: no such providers or options. RunError: a
    provider failed to start.
    """
    try:
        yield
    except native_failures() as error:
        raise PackageError(
            f"ONNX Runtime cannot open the graph; make the package again, or copy it again: {first_line(error)}",
            path=path,
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"ONNX Runtime cannot start with these providers or options: {first_line(error)}") from error
    except RuntimeError as error:
        raise RunError(f"ONNX Runtime cannot start: {first_line(error)}", path=path) from error


@contextmanager
def fail_in_run() -> Iterator[None]:
    """Around a run. Raises FeedError: ONNX Runtime refuses an argument. RunError: it failed."""
    try:
        yield
    except OnnxLoraError:
        raise
    except _all_failures() as error:
        if type(error).__name__ == "InvalidArgument":
            message = f"ONNX Runtime refuses the inputs; correct what it names: {first_line(error)}"
            raise FeedError(message) from error
        raise RunError(f"ONNX Runtime failed in the run: {first_line(error)}") from error


def _all_failures() -> tuple[type[Exception], ...]:
    # pybind turns what is not ONNX Runtime's own into those behind: std::out_of_range into an IndexError, and so on.
    return (*native_failures(), RuntimeError, ValueError, TypeError, MemoryError, LookupError, ArithmeticError)
