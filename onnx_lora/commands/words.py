"""Messages in the words of the command line. Everything below it writes for Python: an argument stands in backquotes,
as `allow_unproven=True`; here it becomes the option of the same name."""

from __future__ import annotations

import re
from dataclasses import replace

from onnx_lora.results import ErrorResult

__all__ = ["OPTIONS", "error_in_options", "in_options"]

# An argument with a value, or with none where the sentence says it.
_ARGUMENT = re.compile(r"`([a-z_]+)=([^`]*)`")

# The options of arguments that messages name. Other tools' arguments stay as they are.
OPTIONS: dict[str, str] = {
    "allow_unproven": "allow-unproven",
    "checkpoint": "checkpoint",
    "dora": "dora",
    "feeds": "feeds",
    "initial": "initial",
    "name": "adapter-name",
    "package": "package",
    "replaceable": "replaceable",
    "requantize": "requantize",
    "strict": "strict",
    "targets": "targets",
    "verify": "verify",
    "via": "via",
}

# Values that an option does not repeat.
_FLAGS = frozenset({"True", "Requantize()", "...", ""})


def in_options(text: str) -> str:
    """The text with options in the place of arguments: `--allow-unproven`."""
    return _ARGUMENT.sub(_as_option, text)


def error_in_options(error: ErrorResult) -> ErrorResult:
    """The error with options in the place of arguments."""
    problems = [in_options(problem) for problem in error.problems]
    return replace(error, message=in_options(error.message), problems=problems)


def _as_option(found: re.Match[str]) -> str:
    name, value = found.groups()
    option = OPTIONS.get(name)
    if option is None:
        return found[0]
    if value == "False":
        return f"`--no-{option}`"
    if value in _FLAGS:
        return f"`--{option}`"
    words = re.findall(r'"([^"]*)"', value)
    return f"`--{option} {','.join(words) or value}`"
