"""Conversations: a package's chat template, found and applied. How templates are rendered is the business of
`template.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_lora.boundary import public
from onnx_lora.errors import PackageError, PromptError, printable
from onnx_lora.runtime.generation.settings import read_object, read_text
from onnx_lora.runtime.generation.template import TemplateFailure, render

__all__ = ["Chat", "ChatTemplate"]

_CONFIG = "tokenizer_config.json"
_FILE = "chat_template.jinja"
_SPECIAL = "special_tokens_map.json"

# Of several templates the one without a purpose of its own.
_DEFAULT = "default"

# Descriptions of tools nest a dozen levels; a list that holds itself has no end.
_DEEPEST = 100  # levels

# How much of a value's place a message shows.
_PLACE = 80  # characters

# Python writes no longer numbers as text (`sys.set_int_max_str_digits`): 4300 digits.
_LONGEST_NUMBER = 14_280  # bits


@public
@dataclass(frozen=True)
class Chat:
    """A conversation as a prompt. `messages`: mappings with "role" and "content", as chat templates take them.

    `variables`: what else the template knows, such as `tools` or `enable_thinking`. Both hold what JSON can: texts,
    numbers, lists (a tuple counts as one), mappings with texts as keys, True, False and None.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's source, and the special tokens that it may name."""

    source: str
    tokens: Mapping[str, str]
    path: Path

    @staticmethod
    def read(folder: Path) -> ChatTemplate:
        """Raises PackageError: the package has no template."""
        config = read_object(folder / _CONFIG)
        file = folder / _FILE
        written = read_text(file)
        if written is None:
            path, source = folder / _CONFIG, _choose_template(config.get("chat_template"))
        else:
            path, source = file, written
        if source is None:
            raise PackageError(
                f"must hold a chat template for a chat ({_FILE}, or chat_template in {_CONFIG}); "
                "copy the model's into it, or give the prompt as plain text",
                path=folder,
            )
        found = {**read_object(folder / _SPECIAL), **config}
        return ChatTemplate(source, _read_special_tokens(found), path)

    def text(self, chat: Chat) -> str:
        """The prompt that asks for an answer to `chat`.

        Raises PromptError: the messages are none, or the template refuses them, fails, or takes too long or too much
        memory. MissingDependencyError: no jinja2. RunError: no process can be started to render it.
        """
        _check(chat)
        usual = {"tools": None, "documents": None, "add_generation_prompt": True}
        given = {name: _make_plain(value, name) for name, value in chat.variables.items()}
        messages = [_make_plain(message, f"messages[{index}]") for index, message in enumerate(chat.messages)]
        try:
            return render(self.source, {**self.tokens, **usual, **given, "messages": messages})
        except TemplateFailure as error:
            raise PromptError(
                f"the chat template gives no prompt for these messages: {error}", path=self.path
            ) from error


def _choose_template(found: object) -> str | None:
    """The one template; of a list of named ones the default, or else the first."""
    if isinstance(found, str):
        return found
    if not isinstance(found, list):
        return None
    first: str | None = None
    for entry in found:
        template = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(template, str):
            continue
        if entry.get("name") == _DEFAULT:
            return template
        if first is None:
            first = template
    return first


def _read_special_tokens(found: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name, value in found.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
    return tokens


def _check(chat: Chat) -> None:
    messages, variables = chat.messages, chat.variables
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError('a chat must be a list of messages like {"role": "user", "content": "Hi"}, and not empty')
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise PromptError("a chat's variables must be a mapping from names, which are texts, to values")
    wrong: list[str] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            found = _describe_message(message)
            wrong.append(f"message {index} must be a mapping with a role, which is a text; it is {found}")
    if wrong:
        raise PromptError("the chat's messages cannot be read", problems=wrong)


def _describe_message(message: object) -> str:
    if isinstance(message, Mapping):
        role = message.get("role")
        return "a mapping without one" if role is None else f"a mapping whose role is a {type(role).__name__}"
    return f"a {type(message).__name__}"


def _make_plain(value: object, place: str, depth: int = 0) -> object:
    """`value` as JSON can hold it. Raises PromptError: it cannot."""
    if depth > _DEEPEST:
        raise PromptError(f"what a chat's template is given must not nest deeper than {_DEEPEST} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                shown = printable(place, _PLACE)
                raise PromptError(f"{shown} must have texts as keys, and has a {type(key).__name__}")
        return {key: _make_plain(each, f"{place}.{key}", depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_make_plain(each, f"{place}[{index}]", depth + 1) for index, each in enumerate(value)]
    if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        shown = printable(place, _PLACE)
        raise PromptError(f"{shown} must be a number that can be written, and has {value.bit_length()} bits")
    if value is None or isinstance(value, str | int | float):
        return value
    shown, kind = printable(place, _PLACE), type(value).__name__
    raise PromptError(f"{shown} must be what JSON can hold (texts, numbers, lists, mappings), and is a {kind}")
