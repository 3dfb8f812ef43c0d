"""`onnx-lora`, and `python -m onnx_lora`: how the command begins and is ended from outside. It knows signals, and no
command; what takes time to import is imported where Ctrl-C ends quietly."""

from __future__ import annotations

import sys

__all__ = ["main"]

# What a shell says of a program that a signal ended: 128 and the signal's number, which is 2 of Ctrl-C.
_SIGNALLED = 128
_INTERRUPTED = 130


def main() -> None:
    """Run the command line. SIGTERM and SIGHUP end it as an error does: what was half done is taken away."""
    try:
        import signal

        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Under nohup, SIGHUP is ignored, and stays so.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end)
        from onnx_lora.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _end(number: int, _: object) -> None:
    import signal

    signal.signal(number, signal.SIG_IGN)  # once is enough: the second must not disturb the tidying up
    sys.stderr.write("told to end; nothing half done is left\n")
    sys.exit(_SIGNALLED + number)


if __name__ == "__main__":
    main()
