"""`onnx-lora`, and `python -m onnx_lora`: how the command begins and is ended from outside. It knows signals, and no
command; what takes time to import is imported where Ctrl-C ends quietly."""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["main"]

# What a shell says of a program that a signal ended: 128 and the signal's number, which is 2 of Ctrl-C.
_SIGNALLED = 128
_INTERRUPTED = 130

# The exit code of errors.OutsideError: a library is missing.
_OUTSIDE = 3


def main() -> None:
    """Run the command line. SIGTERM and SIGHUP end it as an error does: what was half done is taken away."""
    try:
        import signal

        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Under nohup, SIGHUP is ignored, and stays so.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end)
        _command()()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _command() -> Callable[[], None]:
    """The command line, where its libraries are installed; a program on a device has no use for them."""
    from onnx_lora.extras import how_to_install

    try:
        from onnx_lora.cli import main as command
    except ModuleNotFoundError as error:
        cure = how_to_install(error.name or "")
        if cure is None:
            raise
        sys.stderr.write(f"error: the command onnx-lora needs {error.name}; install it: {cure}\n")
        sys.exit(_OUTSIDE)
    return command


def _end(number: int, _: object) -> None:
    import signal

    signal.signal(number, signal.SIG_IGN)  # once is enough: the second must not disturb the tidying up
    sys.stderr.write("told to end; nothing half done is left\n")
    sys.exit(_SIGNALLED + number)


if __name__ == "__main__":
    main()
