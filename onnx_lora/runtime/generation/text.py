"""A package's tokenizer: text to tokens and back. It knows the library `tokenizers`, which is loaded late: tokens
need none. Whoever else calls the library does it within `refused`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnx_lora.errors import MissingDependencyError, OnnxLoraError, PackageError, PromptError, first_line

__all__ = ["TextTokenizer", "translate_failures"]

_FILE = "tokenizer.json"

# The largest that is known has 35 MB.
_LARGEST = 256 * 2**20  # bytes

_PANIC = "PanicException"  # pyo3's

# How much of a prompt a message shows.
_SHOWN = 40  # characters


@contextmanager
def translate_failures(kind: type[OnnxLoraError], message: str, path: Path | None = None) -> Iterator[None]:
    """Around a call of the library: its exceptions become a `kind`. At some broken files and texts its Rust code
    panics: an exception that is no Exception, of a class that cannot be imported, and lines on stderr."""
    try:
        yield
    except OnnxLoraError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise kind(f"{message}: {first_line(error)}", path=path) from error


class TextTokenizer:
    """Whole texts only; what comes token by token is decoded in `pieces.py`."""

    def __init__(self, inner: Any, path: Path | None = None) -> None:
        self._inner = inner
        self._path = path

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
        with translate_failures(PackageError, "cannot be read as a tokenizer; copy it again", file):
            if (size := file.stat().st_size) > _LARGEST:
                raise PackageError(f"must not have more than {_LARGEST} bytes, and has {size}", path=file)
            inner = Tokenizer.from_file(str(file))
            # Some files keep what their training was padded and cut to.
            inner.no_padding()
            inner.no_truncation()
        return TextTokenizer(inner, file)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens, with what the tokenizer puts around a text where `special`. Raises PromptError: it is no text, or the
        tokenizer fails on it."""
        if not isinstance(text, str):
            raise PromptError(f"a prompt must be text or a Chat for the tokenizer, and is a {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeError as error:
            raise PromptError(f"a prompt must be valid Unicode, and is {text[:_SHOWN]!r}: {error}") from error
        with translate_failures(PromptError, f"the tokenizer refuses {text[:_SHOWN]!r}", self._path):
            return list(self._inner.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens; ids that the tokenizer does not have say nothing. Raises PackageError: the
        tokenizer fails on them."""
        message = "the tokenizer cannot write the model's tokens as text; copy it again"
        with translate_failures(PackageError, message, self._path):
            text: str = self._inner.decode(tokens, skip_special_tokens=True)
        return text
