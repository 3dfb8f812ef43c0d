"""Every format of adapters by its name: ours, and those of other distributions. From this one list come `read_adapter`,
`write_adapter`, the choices of `convert --format` and the table of docs/formats.md. It knows no format's inside.

A new format is a file with its object, and a line here. Other distributions name theirs by an entry point of the group
`onnx_lora.formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, Delta, MatrixDelta, PortableAdapter, Replacement
from onnx_lora.adapters.formats.format import (
    AdapterFormat,
    HoldsSeveral,
    ReadsInitial,
    ReadsMemory,
    Row,
    WritesBound,
    WritesPortable,
)
from onnx_lora.adapters.formats.place import Place
from onnx_lora.adapters.formats.unknown import explain_unknown
from onnx_lora.adapters.plugins import Plugins
from onnx_lora.boundary import call_foreign
from onnx_lora.errors import PluginError
from onnx_lora.package import Package

__all__ = [
    "GROUP",
    "RegisteredFormat",
    "find_format",
    "format_names",
    "format_of_memory",
    "holds_graph_inputs",
    "recognise",
]

T = TypeVar("T")

# Of entry points.
GROUP = "onnx_lora.formats"

# Ours are asked in this order whether a file or a folder is theirs; and the first of an ending is written where nothing
# else is said.
_OURS = {
    "safetensors": "onnx_lora.adapters.formats.converted.safetensors:FORMAT",
    "onnx_adapter": "onnx_lora.adapters.formats.converted.onnx_adapter:FORMAT",
    "peft": "onnx_lora.adapters.formats.peft.peft:FORMAT",
    "kohya": "onnx_lora.adapters.formats.diffusion.kohya:FORMAT",
    "cloneofsimo": "onnx_lora.adapters.formats.diffusion.cloneofsimo:FORMAT",
    "diffusers": "onnx_lora.adapters.formats.diffusion.diffusers:FORMAT",
    "comfyui": "onnx_lora.adapters.formats.diffusion.comfyui:FORMAT",
    "mlx": "onnx_lora.adapters.formats.mlx.mlx:FORMAT",
    "gguf": "onnx_lora.adapters.formats.gguf.gguf:FORMAT",
}

# They have marks at fixed places, which say more than a header that others share.
_ASKED_FIRST = ("onnx_adapter", "gguf")

# Whose reader says what is missing in a folder that is nobody's.
_OF_ANY_FOLDER = "peft"

# Whose tensors and config are taken from memory too.
_OF_MEMORY = "peft"

_PLUGINS: Plugins[AdapterFormat] = Plugins(GROUP, AdapterFormat, _OURS)


@dataclass(frozen=True)
class RegisteredFormat:
    """A format by its name. Whatever another distribution's does wrong becomes an error that names the distribution."""

    name: str
    format: AdapterFormat
    distribution: str | None  # that brought it, with its version; None: this one

    @property
    def ending(self) -> str:
        return self._call(lambda: self.format.ending, str)

    @property
    def row(self) -> Row:
        return self._call(lambda: self.format.row, Row)

    @property
    def reads_initial(self) -> bool:
        return self._call(lambda: isinstance(self.format, ReadsInitial), bool)

    @property
    def writes_portable(self) -> bool:
        return self._call(lambda: isinstance(self.format, WritesPortable), bool)

    @property
    def writes_bound(self) -> bool:
        return self._call(lambda: isinstance(self.format, WritesBound), bool)

    @property
    def can_write(self) -> bool:
        return self.writes_portable or self.writes_bound

    def recognises(self, place: Place) -> bool:
        return self._call(lambda: self.format.recognises(place), bool)

    def names(self, place: Place) -> Sequence[str | None]:
        """The names of the adapters in a file or folder; None is the one that needs no name."""
        several = self.format
        return self._call(lambda: several.names(place), Sequence) if isinstance(several, HoldsSeveral) else (None,)

    def read(self, place: Place, name: str | None, initial: Path | None = None) -> Adapter:
        """`initial`: the adapter before its training, of a format that `reads_initial`."""
        reader = self.format
        if initial is not None and isinstance(reader, ReadsInitial):
            with_initial = reader
            adapter = self._call(lambda: with_initial.read_with_initial(place, name, initial), Adapter)
        else:
            adapter = self._call(lambda: reader.read(place, name), Adapter)
        if self.distribution is not None:
            self._check(adapter)
        return adapter

    def write_portable(self, adapter: PortableAdapter, out: Path, package: Package | None) -> None:
        """Of a format that `writes_portable`."""
        assert isinstance(self.format, WritesPortable)
        writer = self.format
        self._call(lambda: writer.write_portable(adapter, out, package), None)
        self._check_written(out)

    def write_bound(self, bound: BoundAdapter, out: Path) -> None:
        """Of a format that `writes_bound`."""
        assert isinstance(self.format, WritesBound)
        writer = self.format
        self._call(lambda: writer.write_bound(bound, out), None)
        self._check_written(out)

    def _call(self, function: Callable[[], T], kind: type[T] | None) -> T:
        """What a method gives, an instance of `kind` (None: whatever it is).

        Raises PluginError: another distribution's failed, or gave something else.
        """
        if self.distribution is None:
            return function()
        value = call_foreign(function, lambda said: self._fault(f"must not fail, and does with {said}"))
        if kind is not None and not isinstance(value, kind):
            raise self._fault(f"must give a {kind.__name__}, and gives a {type(value).__name__}")
        return value

    def _check(self, adapter: Adapter) -> None:
        """What `bind` relies on. Raises PluginError."""
        if adapter.origin.format != self.name:
            raise self._fault(f"must give an adapter of its own format, and gives one of {adapter.origin.format!r}")
        parts = ((adapter.deltas, (Delta, MatrixDelta)), (adapter.replacements, Replacement))
        for values, kind in parts:
            for name, value in values.items():
                if not isinstance(name, str) or not isinstance(value, kind):
                    raise self._fault(f"must give deltas and replacements by name, and gives a {type(value).__name__}")

    def _check_written(self, out: Path) -> None:
        if self.distribution is not None and not out.exists():
            raise self._fault("must write the file or folder that it was asked for, and did not")

    def _fault(self, what: str) -> PluginError:
        return PluginError(f"the format {self.name!r}, brought by {self.distribution}, {what}; correct or uninstall it")


def format_names() -> tuple[str, ...]:
    """The names of all formats, ours first; none is loaded for it."""
    return tuple(_PLUGINS)


def find_format(name: str) -> RegisteredFormat:
    """The format of a name in `format_names`.

    Raises PluginError: another distribution's fails to load, is no format, or has a name that is taken.
    """
    found = RegisteredFormat(name, _PLUGINS[name], _PLUGINS.distribution(name))
    if found.distribution is not None:
        own_name = found._call(lambda: found.format.name, str)
        if own_name != name:
            raise found._fault(f"must be called as its entry point is, and calls itself {own_name!r}")
    return found


def holds_graph_inputs(name: str) -> bool:
    """Whether files of this format hold the inputs of one package's graphs. An adapter that was made in memory may name
    any format, or none."""
    return name in format_names() and find_format(name).writes_bound


def recognise(place: Place) -> RegisteredFormat:
    """The format of a file or a folder. Ours are asked first, so that no other takes their files.

    Raises AdapterFileError: it is damaged, or of no format. PluginError: formats of two distributions claim it, or one
    of them fails.
    """
    for name in sorted(_OURS, key=lambda name: name not in _ASKED_FIRST):
        own = find_format(name)
        if own.recognises(place):
            return own
    claims = [other for other in _load_others() if other.recognises(place)]
    if len(claims) > 1:
        both = " and ".join(f"{claim.name!r} of {claim.distribution}" for claim in claims)
        raise PluginError(f"must be of one format, and is claimed by {both}; uninstall one", path=place.path)
    if claims:
        return claims[0]
    if place.is_folder:
        return find_format(_OF_ANY_FOLDER)
    raise explain_unknown(place, _file_endings(), _PLUGINS.refused)


def format_of_memory() -> ReadsMemory:
    """The format whose tensors and config may come from memory."""
    own = find_format(_OF_MEMORY).format
    assert isinstance(own, ReadsMemory)
    return own


def _file_endings() -> list[str]:
    endings = (find_format(name).ending for name in format_names())
    return list(dict.fromkeys(ending for ending in endings if ending))


def _load_others() -> Iterator[RegisteredFormat]:
    for name in format_names():
        if name not in _OURS:
            yield find_format(name)
