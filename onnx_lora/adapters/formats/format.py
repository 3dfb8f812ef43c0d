"""What a format of adapters is to the rest: an object that recognises its files, reads them and, if it can, writes
them. It knows no format.

A format of another distribution is such an object too, named by an entry point of the group `onnx_lora.formats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from onnx_lora.adapters.adapter import Adapter, BoundAdapter, PortableAdapter
    from onnx_lora.adapters.formats.place import Place
    from onnx_lora.package import Package

__all__ = ["AdapterFormat", "HoldsSeveral", "ReadsInitial", "ReadsMemory", "Row", "WritesBound", "WritesPortable"]


@dataclass(frozen=True)
class Row:
    """A format's row in the table of docs/formats.md, in Markdown."""

    title: str
    recognised_by: str
    scale: str  # what the factors' product is multiplied with
    refused: str


@runtime_checkable
class AdapterFormat(Protocol):
    """A format that adapters are read from. One that is written has a method of `WritesPortable` or of `WritesBound`
    as well."""

    @property
    def name(self) -> str:
        """As `convert --format` takes it, and as `Origin.format` says it: "kohya"."""

    @property
    def ending(self) -> str:
        """What the names of its files end with, ".safetensors"; empty for a folder."""

    @property
    def row(self) -> Row:
        """For the table of the docs."""

    def recognises(self, place: Place) -> bool:
        """Whether the file or folder is of this format. Ask `place`, which opens a file once; open nothing.

        A damaged one of this format is recognised: `read` says what is wrong with it.
        """

    def read(self, place: Place, name: str | None) -> Adapter:
        """The adapter. `name`: what to call it; None: as the file says, or `place.default_name`.

        Raises AdapterFileError: damaged. UnsupportedAdapterError: a method, or a tensor, that is refused.
        """


@runtime_checkable
class HoldsSeveral(Protocol):
    """A format of which one file or folder may hold several adapters."""

    def names(self, place: Place) -> Sequence[str | None]:
        """The names by which `read` chooses each of the adapters; None is the one that needs no name.

        Raises AdapterFileError: damaged. UnsupportedAdapterError: a method that is refused.
        """


@runtime_checkable
class ReadsInitial(Protocol):
    """A format whose adapters may have taken something out of the base's weights before the training began."""

    def read_with_initial(self, place: Place, name: str | None, initial: Path) -> Adapter:
        """As `AdapterFormat.read`, where `initial` is the folder of the adapter before its training."""


@runtime_checkable
class ReadsMemory(Protocol):
    """A format whose tensors and config may come from memory."""

    def read_memory(
        self, tensors: Mapping[str, Any], config: Mapping[str, Any] | Path, name: str | None, initial: Path | None
    ) -> Adapter:
        """The adapter of these tensors and this config, or the one in the file `config`. Raises as `AdapterFormat.read`
        and `ReadsInitial.read_with_initial` do."""


@runtime_checkable
class WritesPortable(Protocol):
    """A format that holds adapters which are tied to no graph."""

    def write_portable(self, adapter: PortableAdapter, out: Path, package: Package | None) -> None:
        """Write the file or the folder `out`, which is free. `package`: the one that the adapter is for, if given.

        Raises UnsupportedAdapterError: what the format cannot hold, all of it.
        """


@runtime_checkable
class WritesBound(Protocol):
    """A format whose tensors are inputs of a package's graphs."""

    def write_bound(self, bound: BoundAdapter, out: Path) -> None:
        """Write the file `out`, which is free. Raises BindError: some of the adapter can only be folded."""
