"""Chat templates as Hugging Face writes them, rendered in another process. A template is a program that came with a
model: this module starts, asks and ends the process that runs it (`template_child.py`), and knows no jinja2."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Timer
from typing import IO, Any

from onnx_lora.errors import MissingDependencyError, RunError

__all__ = ["TemplateFailure", "render"]

_PROGRAM = Path(__file__).with_name("template_child.py")

# Templates take a millisecond; one that counts to a billion must not hold its caller.
_SECONDS = 5.0

# Loading Python and jinja2 takes 0.1 seconds, and much longer on a machine that is busy with other things.
_START_SECONDS = 60.0

# Messages that fit a context are a few megabytes at most.
_REQUEST = 32 * 2**20  # bytes

# The longest text that the other side writes, every character four bytes long.
_ANSWER = 64 * 2**20 + 1  # bytes

# What the other side's exit code says when it cannot load jinja2.
_NO_JINJA = 3


class TemplateFailure(Exception):  # noqa: N818 - it never leaves the two modules
    """Why a template gave no text."""


class _Ended(Exception):  # noqa: N818 - it never leaves this module
    """The other side's process ended before it answered."""


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The template's text. `variables`: what JSON can hold.

    Raises TemplateFailure: the template fails, refuses, or takes too long or too much memory. MissingDependencyError:
    no jinja2. RunError: no process can be started.
    """
    request = {"seconds": _SECONDS, "source": source, "variables": variables}
    return _renderer.render(json.dumps(request).encode("ascii"))


class _Child:
    """One process, from its start to its end."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                # Isolated: neither the working folder nor the environment says what Python loads.
                [_python(), "-I", str(_PROGRAM), *filter(os.path.isabs, sys.path)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except (OSError, ValueError) as error:
            raise _cannot_start(str(error)) from error
        self._late = False

    @property
    def alive(self) -> bool:
        return not self._late and self._process.poll() is None

    def wait_for_start(self) -> None:
        """Raises MissingDependencyError: no jinja2. RunError: it does not start."""
        try:
            with self._deadline(_START_SECONDS):
                self._receive()
        except _Ended as error:
            code = self.end()
            if code == _NO_JINJA:
                raise MissingDependencyError(
                    "a chat needs the package jinja2: pip install 'onnx-lora[generate]'"
                ) from error
            raise _cannot_start(f"it ended with code {code}") from error

    def ask(self, request: bytes) -> bytes:
        """Raises TemplateFailure: it gave no answer in time, or ended."""
        try:
            with self._deadline(_SECONDS):
                self._send(request)
                return self._receive()
        except _Ended as error:
            code = self.end()
            if self._late:
                raise TemplateFailure(f"it runs for more than {_SECONDS:g} seconds") from error
            raise TemplateFailure(f"it ended the process that renders it (code {code})") from error

    @contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        """Kills the process when the time is up: a read that waits for it ends by that, on every platform."""
        timer = Timer(seconds, self._kill_late)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:
            raise _cannot_start(str(error)) from error
        try:
            yield
        finally:
            timer.cancel()
            # When this returns it is decided whether it came too late.
            timer.join()

    def _kill_late(self) -> None:
        self._late = True
        self._process.kill()

    def _send(self, message: bytes) -> None:
        rest = memoryview(len(message).to_bytes(4, "big") + message)
        try:
            while rest:
                rest = rest[self._in.write(rest) :]
        except OSError as error:
            raise _Ended from error

    def _receive(self) -> bytes:
        size = int.from_bytes(self._read(4), "big")
        if size > _ANSWER:
            raise _Ended
        return self._read(size)

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._out.read(size)
            if not part:
                raise _Ended
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    @property
    def _in(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def end(self) -> int:
        """Its exit code."""
        self._process.kill()
        self.leave()
        return self._process.wait()

    def leave(self) -> None:
        """Close the pipes; a process that waits for a request ends by that."""
        self._in.close()
        self._out.close()


class _Renderer:
    """The one child of this process: started when it is first needed, and again when it has ended. It answers one
    thread at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: _Child | None = None

    def render(self, request: bytes) -> str:
        if len(request) > _REQUEST:
            raise TemplateFailure(f"template and messages take {len(request)} bytes, and may take {_REQUEST}")
        with self._lock:
            answer = self._answer(request)
        text = answer[1:].decode("utf-8", "surrogatepass")
        if answer[:1] != b"+":
            raise TemplateFailure(text)
        return text

    def _answer(self, request: bytes) -> bytes:
        answered = False
        try:
            if self._child is None or not self._child.alive:
                self.close()
                self._child = _Child()
                self._child.wait_for_start()
            answer = self._child.ask(request)
            answered = True
            return answer
        finally:
            # Also when the caller is interrupted: an answer that nobody waits for must not be the next one's.
            if not answered:
                self.close()

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def forget(self) -> None:
        """In a copy of this process: the child answers the original."""
        child, self._child, self._lock = self._child, None, Lock()
        if child is not None:
            child.leave()


def _python() -> str:
    """Raises RunError: this program is no Python that could be started again."""
    name = Path(sys.executable or "").name.lower()
    if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        raise _cannot_start(f"{name or 'this program'} is no Python interpreter")
    return sys.executable


def _cannot_start(reason: str) -> RunError:
    return RunError(
        "chat templates are rendered by a Python process of their own, and it cannot be started; "
        f"give the prompt as plain text instead: {reason}"
    )


_renderer = _Renderer()
atexit.register(_renderer.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)
