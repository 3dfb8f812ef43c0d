"""A call in another Python, whose environment has libraries that this one cannot have. It knows processes, and nothing
of what is called.

What goes over the pipes is pickled: both ends are this library in the same version, in environments of one user."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from tempfile import TemporaryFile
from typing import IO, Any, TypeVar, cast

from onnx_lora.boundary import translate
from onnx_lora.errors import ExportError, MissingDependencyError, OnnxLoraError

__all__ = ["call_in"]

T = TypeVar("T")

# What the child says: a call of one of the caller's functions, a line for a logger, and how it ended.
_CALLED, _LOGGED, _GAVE, _RAISED = "called", "logged", "gave", "raised"

_LAST_WORDS = 2000  # bytes of what a child that died wrote to stderr


def call_in(python: str | None, function: Callable[..., T], *args: Any, **callbacks: Callable[..., object]) -> T:
    """Call a function of this library in a process of another interpreter, and give what it gives.

    python: the interpreter, in whose environment this library is installed in this version; None: this one, and no
        process. args: what can be pickled. callbacks: functions, which are called here, in order, and whose results are
        not handed on.

    Raises what the function raises, where it is an OnnxLoraError. MissingDependencyError: there is no such interpreter,
    or it lacks this library, or has another version of it. ExportError: the process died.
    """
    if python is None:
        return function(*args, **callbacks)
    place = f"{function.__module__}:{function.__qualname__}"
    return cast(T, _ask(python, place, args, callbacks))


def _ask(python: str, place: str, args: Sequence[Any], callbacks: Mapping[str, Callable[..., object]]) -> Any:
    from onnx_lora import __version__

    with TemporaryFile() as said, _child(python, said) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # One that is dead already is told below.
        with suppress(BrokenPipeError), process.stdin:
            pickle.dump((__version__, place, args, list(callbacks)), process.stdin)
        for kind, content in _messages(process.stdout):
            if kind == _CALLED:
                name, given = content
                callbacks[name](*given)
            elif kind == _LOGGED:
                logger, level, text = content
                logging.getLogger(logger).log(level, "%s", text)
            elif kind == _GAVE:
                return content
            elif isinstance(content, MissingDependencyError):
                # It must be installed there: here it may be what cannot be had.
                raise MissingDependencyError(f"in {python}: {content.message}")
            else:
                raise content
        raise _explain_death(python, process.wait(), said)


@contextmanager
def _child(python: str, said: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, killed when the block ends before it does: Ctrl-C leaves nothing running."""
    try:
        process = subprocess.Popen(
            [python, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # Ctrl-C comes to us; the child would print a traceback of its own
        )
    except OSError as error:
        raise MissingDependencyError(f"{python} cannot be run: {error.strerror or error}") from error
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _messages(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    while True:
        try:
            yield pickle.load(stream)  # noqa: S301 - what our own process wrote, in an interpreter that the user named
        except (EOFError, pickle.UnpicklingError):
            return  # it died, maybe within a message, or is no Python with this library


def _explain_death(python: str, code: int, said: IO[bytes]) -> OnnxLoraError:
    said.seek(0, os.SEEK_END)
    said.seek(max(0, said.tell() - _LAST_WORDS))
    lines = said.read().decode("utf-8", "replace").strip().splitlines()
    words = lines[-1] if lines else "it said nothing"
    if "No module named" in words:
        return MissingDependencyError(f"{python} must have onnx-lora in this version, and says: {words}")
    how = f"was killed by signal {-code}, often for lack of memory" if code < 0 else f"ended with {code}"
    return ExportError(f"the process of {python} {how}: {words}")


# --- the child's side --------------------------------------------------------------------------


class _Forwarder(logging.Handler):
    """Sends what the library logs to the process that asked."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(_LOGGED, (record.name, record.levelno, record.getMessage()))


def _answer() -> None:
    """Read one request from stdin, and write to stdout what comes of it."""
    from onnx_lora import __version__

    # What libraries print is not for whoever reads the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(kind: str, content: Any) -> None:
        pickle.dump((kind, content), answers)
        answers.flush()

    version, place, args, names = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    if version != __version__:
        reason = f"{sys.executable} has onnx-lora {__version__}, and must have {version}, as what calls it"
        return send(_RAISED, MissingDependencyError(reason))
    logger = logging.getLogger("onnx_lora")
    logger.addHandler(_Forwarder(send))
    module, _, function = place.partition(":")

    def forwarding(name: str) -> Callable[..., None]:
        return lambda *given: send(_CALLED, (name, given))

    try:
        gave = getattr(import_module(module), function)(*args, **{name: forwarding(name) for name in names})
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends this process
        return send(_RAISED, error if isinstance(error, OnnxLoraError) else translate(error))
    return send(_GAVE, gave)


if __name__ == "__main__":
    _answer()
