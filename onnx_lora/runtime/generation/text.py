"""A package's tokenizer: text to tokens and back. It knows the library `tokenizers`, which is loaded late: tokens
need none."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnx_lora.errors import MissingDependencyError, PackageError, PromptError

__all__ = ["TextTokenizer"]

_FILE = "tokenizer.json"


class TextTokenizer:
    """Whole texts only; what comes token by token is decoded in `pieces.py`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @staticmethod
    def possible(folder: Path) -> bool:
        """Whether the package has a tokenizer, and this Python the library."""
        return (folder / _FILE).is_file() and find_spec("tokenizers") is not None

    @staticmethod
    def open(folder: Path) -> TextTokenizer:
        """Raises PackageError: the package has no tokenizer, or a damaged one. MissingDependencyError: no library."""
        file = folder / _FILE
        if not file.is_file():
            raise PackageError(
                f"must hold {_FILE} for text to go in and come out; copy the model's into it, or give token ids",
                path=folder,
            )
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "text needs the package tokenizers (token ids do not): pip install 'onnx-lora[generate]'"
            ) from error
        try:
            inner = Tokenizer.from_file(str(file))
        except Exception as error:
            raise PackageError(f"cannot be read as a tokenizer: {error}; copy it again", path=file) from error
        # Some files keep what their training was padded and cut to.
        inner.no_padding()
        inner.no_truncation()
        return TextTokenizer(inner)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens, with what the tokenizer puts around a text where `special`. Raises PromptError: it is no text."""
        try:
            text.encode("utf-8")
            return list(self._inner.encode(text, add_special_tokens=special).ids)
        except UnicodeError as error:
            raise PromptError(f"a prompt must be valid Unicode, and is {text[:40]!r}: {error}") from error
        except Exception as error:
            raise PromptError(f"the tokenizer refuses {text[:40]!r}: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens; ids that the tokenizer does not have say nothing."""
        text: str = self._inner.decode(tokens, skip_special_tokens=True)
        return text
