"""The program that renders chat templates, in a process of its own whose memory and time are limited. It knows jinja2
and what transformers gives to templates, and imports nothing of this package: `template.py` starts it and asks it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

# Behind Python's own folders: where the caller's Python finds its packages (a user's folder, PYTHONPATH).
sys.path += sys.argv[1:]

try:
    import resource
except ImportError:  # no limits on Windows
    resource = None  # type: ignore[assignment]

try:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox
except ImportError:
    sys.exit(3)  # `template.py` knows what it means

# Of a process that has Python and jinja2 loaded, which are 25 MiB of it. Messages of 16 MB, written out, took 160 MiB.
_MEMORY = 512 * 2**20  # bytes

# Compiling a long template takes 20 ms, and a conversation asks for the same one again and again.
_KEPT = 8  # templates

# No conversation is longer, and one that fits a context is much shorter.
_CHARACTERS = 16 * 2**20

# The template's words on why it gives no text; a person reads them.
_LONGEST_REASON = 1000  # characters


class _Failure(Exception):  # noqa: N818 - it never leaves this program
    """Why a template gave no text, in our words."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks, in training, what the model says. Here it means nothing, but its body is a function's,
    as in transformers: what is set there is not known behind it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(_KEPT)
def _compiled(source: str) -> jinja2.Template:
    """As transformers sets it up (utils/chat_template_utils.py), so that templates mean the same."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _rendered(source: str, variables: dict[str, Any]) -> str:
    parts: list[str] = []
    size = 0
    for part in _compiled(source).generate(variables):
        parts.append(part)
        size += len(part)
        if size > _CHARACTERS:
            raise _Failure(f"it writes more than {_CHARACTERS} characters")
    return "".join(parts)


def _answer(request: bytes) -> bytes:
    """`+` and the text, or `-` and the reason why there is none."""
    try:
        asked = json.loads(request)
        _limit_time(asked["seconds"])
        # A lone surrogate of a message is for the tokenizer to refuse.
        return b"+" + _rendered(asked["source"], asked["variables"]).encode("utf-8", "surrogatepass")
    except MemoryError:
        reason = f"it needs more memory than {_MEMORY // 2**20} MiB"
    except Exception as error:  # noqa: BLE001 - the template is a foreign program, and may fail in any way
        reason = _reason(error)
    return b"-" + reason[:_LONGEST_REASON].encode("utf-8", "surrogatepass")


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    try:
        words = str(error)
    except Exception:  # noqa: BLE001 - what a template raises may be a number of 10000 digits
        return kind
    if isinstance(error, jinja2.TemplateError | _Failure):
        return words or kind
    return f"{kind}: {words}"


def _limit_memory() -> None:
    if resource is None:
        return
    for limit, value in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with suppress(ValueError, OSError):  # macOS knows the limit on memory, and sets none
            resource.setrlimit(limit, (most, hard))


def _limit_time(seconds: float) -> None:
    """The caller kills this process when the time is up; this is for the case that it was killed before."""
    if resource is None:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    end = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (end if hard == resource.RLIM_INFINITY else min(end, hard), hard))


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Until the caller closes its end, or is no more. A message is its length in four bytes, and so many bytes."""
    answer = b""  # the first says that all is loaded
    while True:
        answers.write(len(answer).to_bytes(4, "big") + answer)
        answers.flush()
        head = requests.read(4)
        if len(head) < 4:
            return
        answer = _answer(requests.read(int.from_bytes(head, "big")))


if __name__ == "__main__":
    # Ctrl-C reaches every process of a terminal, and is the caller's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    _serve(sys.stdin.buffer, sys.stdout.buffer)
