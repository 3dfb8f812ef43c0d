"""An adapter as a file or a folder of any format. It knows which there are by their registry, and none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from onnx_lora.adapters.adapter import Adapter, BoundAdapter, PortableAdapter
from onnx_lora.adapters.binding import bind
from onnx_lora.adapters.formats.registry import RegisteredFormat, find_format, format_names
from onnx_lora.adapters.portable import plain, unbound
from onnx_lora.adapters.rebound import rebound
from onnx_lora.boundary import public
from onnx_lora.errors import InputError
from onnx_lora.package import Package
from onnx_lora.staging import staged_place

__all__ = ["FORMATS", "write_adapter", "write_bound"]


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
            raise InputError(
                f"{format} holds the inputs of a package's graphs: give that package (--package)", path=target
            )
        own = rebound(adapter, package) if isinstance(adapter, BoundAdapter) else bind(adapter, package)
        return _write_bound(own, target, chosen)
    portable = _portable(adapter, package, target)
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


def _find_writable(name: object, target: Path) -> RegisteredFormat:
    """Raises InputError: no format, or one that is only read."""
    if isinstance(name, str) and name in FORMATS:
        return find_format(name)
    raise InputError(f"the format must be one of {', '.join(FORMATS)}, and is {name!r}", path=target)


def _write_bound(bound: BoundAdapter, target: Path, format: RegisteredFormat) -> Path:
    with staged_place(target) as place:
        format.write_bound(bound, place)
    return target


def _portable(adapter: Adapter | BoundAdapter, package: Package | None, target: Path) -> PortableAdapter:
    """What foreign formats can hold of it, checked against the package where there is one."""
    if isinstance(adapter, Adapter) and not _holds_graph_inputs(adapter):
        own = plain(adapter, package)
        if package is None:
            return own
        # PEFT saves the base's own embeddings beside a change of them.
        kept = bind(adapter, package).coverage.replaced
        return replace(own, replacements={name: each for name, each in own.replacements.items() if name in kept})
    if package is None:
        raise InputError(
            "a bound adapter, and a file of one, need the package that it is bound to (--package)", path=target
        )
    bound = rebound(adapter, package) if isinstance(adapter, BoundAdapter) else bind(adapter, package)
    return unbound(bound, package)


def _holds_graph_inputs(adapter: Adapter) -> bool:
    """Whether it was read from a file of a bound adapter. One that was made in memory may say any format, or none."""
    name = adapter.origin.format
    return name in format_names() and find_format(name).writes_bound
