"""An adapter as a file or a folder of any format, or all adapters of a folder. Which formats there are it knows by
their registry, and none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from onnx_lora import __version__
from onnx_lora.adapters.adapter import Adapter, BoundAdapter
from onnx_lora.adapters.batch.collection import FoundAdapter, find_adapters
from onnx_lora.adapters.batch.convert import ConvertedFolder, Progress, Recipe, check_places, convert_collection
from onnx_lora.adapters.batch.records import MadeOf
from onnx_lora.adapters.binding import bind
from onnx_lora.adapters.formats.registry import RegisteredFormat, find_format, format_names, holds_graph_inputs
from onnx_lora.adapters.portable import make_portable
from onnx_lora.adapters.read import read_adapter
from onnx_lora.boundary import public
from onnx_lora.errors import InputError
from onnx_lora.manifest import MANIFEST
from onnx_lora.package import Package
from onnx_lora.staging import staged_place

__all__ = ["FORMATS", "convert_all", "write_adapter", "write_bound"]


class _Writable(Mapping[str, str]):
    """Every format that can be written, ours first, by what the names of its files end with; a folder has nothing."""

    def __getitem__(self, name: str) -> str:
        """Raises KeyError: no format, or one that is only read. PluginError: another distribution's fails."""
        if not isinstance(name, str) or name not in format_names() or not find_format(name).can_write:
            raise KeyError(name)
        return find_format(name).ending

    def __iter__(self) -> Iterator[str]:
        return (name for name in format_names() if find_format(name).can_write)

    def __len__(self) -> int:
        return sum(1 for _ in self)


FORMATS: Mapping[str, str] = _Writable()


@public
def write_adapter(
    adapter: Adapter | BoundAdapter,
    out: str | os.PathLike[str],
    *,
    format: str,
    package: Package | None = None,
) -> Path:
    """Write an adapter, or a bound one (a blend), to `out`, whole or not at all.

    `format`: a name in `FORMATS`. `package`: needed for formats that hold graph inputs ("safetensors" and
    "onnx_adapter"), for "gguf", for a bound adapter, for flat names, and for changes that become factors only with the
    base's weights.

    Raises OutputExistsError: `out` exists. StorageError: it cannot be written. UnsupportedAdapterError: the format
    cannot hold it, or only a package could tell how. BindError: it does not fit `package`. MissingDependencyError:
    "onnx_adapter" and no ONNX Runtime, "gguf" and no `gguf`. PluginError: another distribution's format fails.
    InputError: an unknown format, or no package.
    """
    target = Path(out)
    chosen = _find_writable(format, target)
    if chosen.writes_bound:
        if package is None:
            raise _needs_package(format, target)
        return _write_bound(bind(adapter, package), target, chosen)
    portable = make_portable(adapter, package, laid_out=holds_graph_inputs(adapter.origin.format))
    with staged_place(target) as place:
        chosen.write_portable(portable, place, package)
    return target


@public
def write_bound(bound: BoundAdapter, out: str | os.PathLike[str], *, format: str = "safetensors") -> Path:
    """Write a bound adapter to the file `out`, whole or not at all.

    `format`: one that holds graph inputs, "safetensors" or "onnx_adapter".

    Raises OutputExistsError: `out` exists. StorageError: it cannot be written. BindError: some of it can only be
    folded. MissingDependencyError: `.onnx_adapter`, and no ONNX Runtime. InputError: an unknown format.
    """
    target = Path(out)
    chosen = _find_writable(format, target)
    if not chosen.writes_bound:
        known = " or ".join(name for name in FORMATS if find_format(name).writes_bound)
        raise InputError(f"the format must be {known}, and is {format!r}", path=target)
    return _write_bound(bound, target, chosen)


@public
def convert_all(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str,
    package: str | os.PathLike[str] | Package | None = None,
    strict: bool = False,
    allow_unproven: bool = False,
    progress: Progress = lambda *_: None,
) -> ConvertedFolder:
    """Convert every adapter in `folder`, at any depth, to a file (or folder) of its name in `out`, in a format of
    `write_adapter`. Of a file or an adapter's folder that holds several, each is written as NAME-ADAPTER.

    One that fails says why in its `error`, and the others are converted. What an earlier run wrote is left alone where
    it is whole and would be the same again: of files with the same digests, for the same package, by the same version
    of onnx-lora, under the same conditions. Else it is replaced, once the new one is whole. The same input gives the
    same bytes.

    package, strict, allow_unproven: as for `write_adapter`, `bind` and `Package.open`. progress: called with an
    adapter's place, how many are done, and how many there are.

    Raises InputError: no such folder, no adapter in it, an unknown format, or one that needs a package; `out` lies in
    `folder`, or holds it. PackageError: the package cannot be opened. StorageError: `out` cannot be written, or another
    run converts into it.
    """
    source, target = Path(folder), Path(out)
    check_places(source, target)
    chosen = _find_writable(format, target)
    if package is None and chosen.writes_bound:
        raise _needs_package(format, target)
    opened = package if isinstance(package, Package) or package is None else Package.open(package)
    if opened is not None and allow_unproven:
        opened = opened.allowing_unproven(allow_unproven)
    collection = find_adapters(source)
    if not collection.found:
        raise InputError("must hold adapters, and holds none", path=source)

    def write(found: FoundAdapter, place: Path) -> Adapter | BoundAdapter:
        adapter = read_adapter(found.path, name=found.name)
        written = adapter if opened is None else bind(adapter, opened, strict=strict)
        write_adapter(written if chosen.writes_bound else adapter, place, format=format, package=opened)
        return written

    conditions = _conditions(chosen, opened, strict=strict)
    return convert_collection(collection, target, Recipe(chosen.ending, conditions, write), progress)


def _conditions(format: RegisteredFormat, package: Package | None, *, strict: bool) -> MadeOf:
    """All that decides about an output but its adapter."""
    version = f"onnx-lora {__version__}"
    if format.distribution is not None:
        version += f", {format.distribution}"
    if package is None:
        return MadeOf(format.name, version, strict, allow_unproven=False)
    manifest = sha256((package.path / MANIFEST).read_bytes()).hexdigest()
    return MadeOf(format.name, version, strict, package.allow_unproven, manifest)


def _needs_package(format: str, target: Path) -> InputError:
    return InputError(
        f"{format} holds the inputs of a package's graphs: give that package (`package=...`)", path=target
    )


def _find_writable(name: object, target: Path) -> RegisteredFormat:
    """Raises InputError: no format, or one that is only read."""
    if isinstance(name, str) and name in FORMATS:
        return find_format(name)
    raise InputError(f"the format must be one of {', '.join(FORMATS)}, and is {name!r}", path=target)


def _write_bound(bound: BoundAdapter, target: Path, format: RegisteredFormat) -> Path:
    with staged_place(target) as place:
        format.write_bound(bound, place)
    return target
