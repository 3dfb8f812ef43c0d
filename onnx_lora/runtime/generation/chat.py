"""Conversations: a package's chat template, found and applied. How templates are rendered is the business of
`template.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_lora.boundary import public
from onnx_lora.errors import MissingDependencyError, PackageError, PromptError
from onnx_lora.runtime.generation.settings import read_object

__all__ = ["Chat", "ChatTemplate"]

_CONFIG = "tokenizer_config.json"
_FILE = "chat_template.jinja"
_SPECIAL = "special_tokens_map.json"

# Of several templates the one without a purpose of its own.
_DEFAULT = "default"


@public
@dataclass(frozen=True)
class Chat:
    """A conversation as a prompt. `messages`: mappings with "role" and "content", as chat templates take them.

    `variables`: what else the template knows, such as `tools` or `enable_thinking`.
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
        source = _single(config.get("chat_template"))
        path = folder / _CONFIG
        if (folder / _FILE).is_file():
            path = folder / _FILE
            try:
                source = path.read_text("utf-8")
            except (OSError, UnicodeError) as error:
                raise PackageError(f"cannot be read: {error}; copy it again", path=path) from error
        if source is None:
            raise PackageError(
                f"must hold a chat template for a chat ({_FILE}, or chat_template in {_CONFIG}); "
                "copy the model's into it, or give the prompt as plain text",
                path=folder,
            )
        found = {**read_object(folder / _SPECIAL), **config}
        return ChatTemplate(source, _special_tokens(found), path)

    def text(self, chat: Chat) -> str:
        """The prompt that asks for an answer to `chat`.

        Raises PromptError: the messages are none, or the template refuses them or fails. MissingDependencyError: no
        jinja2.
        """
        _check(chat)
        try:
            from onnx_lora.runtime.generation.template import TemplateFailure, render
        except ImportError as error:
            raise MissingDependencyError(
                "a chat needs the package jinja2: pip install 'onnx-lora[generate]'"
            ) from error
        usual = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return render(self.source, {**self.tokens, **usual, **chat.variables, "messages": list(chat.messages)})
        except TemplateFailure as error:
            raise PromptError(
                f"the chat template gives no prompt for these messages: {error}", path=self.path
            ) from error


def _single(found: object) -> str | None:
    """One template, or a list of named ones."""
    if isinstance(found, str):
        return found
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        template = named.get(_DEFAULT, next(iter(named.values()), None))
        return template if isinstance(template, str) else None
    return None


def _special_tokens(found: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name, value in found.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
    return tokens


def _check(chat: Chat) -> None:
    messages = chat.messages
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError('a chat must be a list of messages like {"role": "user", "content": "Hi"}, and not empty')
    wrong = [
        f"message {index} must be a mapping with a role, and is {str(message)[:40]!r}"
        for index, message in enumerate(messages)
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str)
    ]
    if wrong:
        raise PromptError("the chat's messages cannot be read", problems=wrong)
