"""Reading an adapter's files: what must hold of any file before its format is looked at. Every file is opened once and
read once, into memory of our own, so that what was checked, used and hashed is the same."""

from __future__ import annotations

import hashlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from onnx_lora import json_text
from onnx_lora.adapters.problems import abbreviate
from onnx_lora.errors import AdapterFileError

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = [
    "Reading",
    "TensorFile",
    "name_problems",
    "open_reading",
    "open_regular",
    "parse_json",
    "translate_damage",
    "widen_bfloat16",
]

# Names of tensors are paths in a model: 60 characters, and of experts in wrappers 150.
_LONGEST_NAME = 1000  # characters

# All that the standard library and numpy were seen to raise, or may, on bytes that are not what they should be.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,  # NotImplementedError and RecursionError among them
    SyntaxError,
    TypeError,
    ValueError,  # UnicodeError among them
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class Reading:
    """A file, read front to back. `left`: its bytes that were not taken yet."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.size = self.left = file.seek(0, 2)
        self._file, self._ahead, self._digest = file, b"", hashlib.sha256()
        file.seek(0)

    def ahead(self, count: int) -> bytes:
        """The next bytes, as many as there are of `count`, which stay to be taken."""
        if len(self._ahead) < count:
            self._ahead += self._file.read(count - len(self._ahead))
        return self._ahead[:count]

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises AdapterFileError: there are fewer."""
        if count > self.left:
            raise AdapterFileError(
                f"ends {count - self.left} bytes too early: it was cut off; get it again", path=self.path
            )
        taken = self._ahead[:count]
        self._ahead = self._ahead[count:]
        if len(taken) < count:
            taken += self._file.read(count - len(taken))
        if len(taken) < count:
            raise AdapterFileError("was cut off while it was read; get it again", path=self.path)
        self.left -= count
        self._digest.update(taken)
        return taken

    def rest(self) -> bytes:
        """All that was not taken yet."""
        return self.take(self.left)

    def sha256(self) -> str:
        """Of the whole file; what was not taken yet is, for that. Raises AdapterFileError: it was cut off."""
        while self.left:
            self.take(min(self.left, 1 << 20))
        return self._digest.hexdigest()


@dataclass(frozen=True)
class TensorFile:
    """What a file of tensors holds, whatever its format."""

    tensors: Mapping[str, Array]
    metadata: Mapping[str, str]
    sha256: str


@contextmanager
def open_reading(path: Path) -> Iterator[Reading]:
    """A regular file, open for reading; whatever the block raises of its bytes becomes one of our errors here.

    Raises AdapterFileError: none, not regular, not readable, or damaged.
    """
    with translate_damage(path), open_regular(path) as file:
        yield Reading(file, path)


def open_regular(path: Path) -> BinaryIO:
    """Raises AdapterFileError: no regular file, or it cannot be read."""
    with translate_damage(path):
        if not path.is_file():
            raise AdapterFileError("must be a file, and there is none", path=path)
        return path.open("rb")


@contextmanager
def translate_damage(path: Path) -> Iterator[None]:
    """What the block raises of a file's bytes becomes AdapterFileError of `path`. Only code that parses bytes belongs
    in it: a mistake of ours would be called damage."""
    try:
        yield
    except OSError as error:
        raise AdapterFileError(f"cannot be read: {error}", path=path) from error
    except MemoryError as error:
        raise AdapterFileError("needs more memory to be read than there is", path=path) from error
    except _DAMAGE as error:
        raise AdapterFileError(
            f"is cut off, damaged, or of another format ({type(error).__name__}: {error}); get it again", path=path
        ) from error


def parse_json(text: bytes, path: Path, *, what: str, names_once: bool = False) -> dict[str, Any]:
    """A JSON object, without numbers that no float holds and without halves of characters. `names_once`: no name comes
    twice in an object; else the last counts, as everywhere in Python.

    Raises AdapterFileError: `what` is damaged, too large, or another kind of JSON.
    """
    return json_text.parse_json(text, path, AdapterFileError, what=what, names_once=names_once)


def name_problems(names: Iterable[str]) -> list[str]:
    """What is wrong with the names of tensors: those that no terminal, file or library can be given."""
    problems = []
    for name in names:
        if len(name) > _LONGEST_NAME:
            problems.append(
                f"{abbreviate(name)}: a name must have at most {_LONGEST_NAME} characters, and has {len(name)}"
            )
        elif not name.isprintable():
            problems.append(f"{abbreviate(name)}: a name must have printable characters only")
    return problems


def widen_bfloat16(bits: Array) -> Array:
    """bfloat16, held as 16-bit integers, as float32: exact, since it is float32's upper half."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
