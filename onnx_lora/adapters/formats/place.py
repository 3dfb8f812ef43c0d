"""A file or a folder that may hold an adapter, and what a format asks to recognise its own. It knows the containers of
tensors, and no format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from onnx_lora.adapters.formats.files.reading import Reading, TensorFile, open_regular, translate_damage
from onnx_lora.adapters.formats.files.safetensors_file import Header, read_behind, read_header
from onnx_lora.errors import AdapterFileError
from onnx_lora.json_file import read_json

__all__ = ["Place"]

T = TypeVar("T")

_BEGINNING = 16  # bytes: marks of formats lie in the first nine


class Place:
    """What stands at a path. A file is open, and is read once, front to back.

    Whatever goes wrong with a file's bytes in a method here is raised as AdapterFileError.
    """

    def __init__(self, path: Path, reading: Reading | None, default_name: str) -> None:
        """`reading`: of a file; None: it is a folder."""
        self.path = path
        self.default_name = default_name
        self._reading = reading
        self._configs: dict[str, Mapping[str, Any] | None] = {}

    # --- folders ---------------------------------------------------------------------------------

    @property
    def is_folder(self) -> bool:
        return self._reading is None

    def has(self, name: str) -> bool:
        """Whether it is a folder with a file of this name."""
        return self.is_folder and (self.path / name).is_file()

    def config(self, name: str) -> Mapping[str, Any] | None:
        """The JSON object of a folder's file; None: there is none, or it cannot be read."""
        if not self.has(name):
            return None
        if name not in self._configs:
            try:
                self._configs[name] = read_json(self.path / name, AdapterFileError)
            except AdapterFileError:
                self._configs[name] = None
        return self._configs[name]

    # --- files -----------------------------------------------------------------------------------

    @cached_property
    def beginning(self) -> bytes:
        """A file's first 16 bytes, or fewer; of a folder none."""
        if self._reading is None:
            return b""
        with translate_damage(self.path):
            return self._reading.ahead(_BEGINNING)

    @cached_property
    def header(self) -> Header | None:
        """Names and metadata of a safetensors file; None: it is no such file.

        Raises AdapterFileError: it is one by its name or its beginning, and damaged.
        """
        if self._reading is None:
            return None
        if self.path.suffix != ".safetensors":
            length = int.from_bytes(self.beginning[:8], "little")
            if self.beginning[8:9] != b"{" or length > self._reading.size - 8:
                return None
        return self.read(read_header)

    def tensors(self) -> TensorFile:
        """What a safetensors file holds. Raises AdapterFileError: damaged, or no such file."""
        header = self.header
        if header is None:
            raise AdapterFileError("must be a safetensors file, and is none", path=self.path)
        return self.read(lambda file: read_behind(file, header))

    def read(self, parse: Callable[[Reading], T]) -> T:
        """What `parse` makes of the file's bytes, whose exceptions count as damage of the file."""
        if self._reading is None:
            raise AdapterFileError("must be a file, and is a folder", path=self.path)
        with translate_damage(self.path):
            return parse(self._reading)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Place]:
        """The folder or the file at `path`, open for as long as the block runs.

        Raises AdapterFileError: nothing there, or it cannot be read.
        """
        try:
            own_name = path.resolve().name
            is_folder, exists = path.is_dir(), path.exists()
        except (OSError, RuntimeError, ValueError) as error:
            raise AdapterFileError(f"cannot be read: {error}", path=path) from error
        if not exists:
            raise AdapterFileError("there is nothing; give an adapter's folder, or its file", path=path)
        if is_folder:
            yield cls(path, None, own_name)
            return
        with cls._open_file(path, path.stem) as place:
            yield place

    @contextmanager
    def open_inside(self, name: str) -> Iterator[Place]:
        """A file of the folder, whose adapter is called as the folder is. Raises AdapterFileError, as `open`."""
        with self._open_file(self.path / name, self.default_name) as place:
            yield place

    @classmethod
    @contextmanager
    def _open_file(cls, path: Path, default_name: str) -> Iterator[Place]:
        with open_regular(path) as file:
            with translate_damage(path):
                reading = Reading(file, path)
            yield cls(path, reading, default_name)
