"""Whatever a caller gives as a package or an adapter, opened and bound. It knows no session and no graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, Union

from onnx_lora.adapters import Adapter, BoundAdapter, bind, read_adapter
from onnx_lora.adapters.compose import make_blend
from onnx_lora.errors import SelectionError
from onnx_lora.package import Package
from onnx_lora.strength import Weight

__all__ = ["AnyAdapter", "AnyPackage", "Mixture", "bind_adapter", "bind_blend", "bind_parts", "open_package"]

AnyAdapter: TypeAlias = Union[str, "os.PathLike[str]", Adapter, BoundAdapter]
AnyPackage: TypeAlias = Union[str, "os.PathLike[str]", Package]

# Several adapters and their weights. Adapters already read cannot be keys: they go in pairs.
Mixture: TypeAlias = Mapping[AnyAdapter, Weight] | Sequence[tuple[AnyAdapter, Weight]]


def open_package(package: AnyPackage, *, allow_unproven: bool = False) -> Package:
    """A package that is open already, or the one in a folder. `allow_unproven`: let adapters be bound to points at
    which the graph may compute something else than the module.

    Raises PackageError: it cannot be opened.
    """
    if isinstance(package, Package):
        return package.allowing_unproven(allow_unproven)
    return Package.open(package, allow_unproven=allow_unproven)


def bind_adapter(
    adapter: AnyAdapter, package: Package, *, name: str | None = None, strict: bool = False
) -> BoundAdapter:
    """Read and bind what is not yet; what is, is checked to be bound to an equal package. `strict` as in `bind`.

    Raises AdapterError: it cannot be read, or does not fit. SelectionError: it is no adapter.
    """
    if isinstance(adapter, Adapter | BoundAdapter):
        return bind(adapter, package, strict=strict)
    if isinstance(adapter, (str, os.PathLike)):
        # The name is the caller's for it: which of several a folder holds, `read_adapter` is told.
        read = read_adapter(adapter)
        return bind(replace(read, name=name or read.name), package, strict=strict)
    raise SelectionError(f"an adapter must be a path, an Adapter or a BoundAdapter, and is a {type(adapter).__name__}")


def bind_blend(adapter: AnyAdapter | Mixture, package: Package, *, strict: bool = False) -> BoundAdapter:
    """One adapter, or several blended into one. `strict` as in `bind`.

    Raises AdapterError: one cannot be read, or does not fit. SelectionError: they cannot be blended.
    """
    parts = bind_parts(adapter, package, strict=strict)
    return parts[0][0] if _is_one(adapter) else make_blend(parts, name="blend")


def bind_parts(
    adapter: AnyAdapter | Mixture, package: Package, *, strict: bool = False
) -> list[tuple[BoundAdapter, Weight]]:
    """The adapters of a blend with their weights; of one adapter itself at weight 1. Raises as `bind_blend`."""
    if isinstance(adapter, (str, os.PathLike, Adapter, BoundAdapter)):
        return [(bind_adapter(adapter, package, strict=strict), 1.0)]
    pairs = list(adapter.items()) if isinstance(adapter, Mapping) else adapter
    if not _are_pairs(pairs):
        raise SelectionError(
            "a blend must be a mapping from adapters to weights, or a list of (adapter, weight) pairs, "
            f"and is a {type(adapter).__name__}"
        )
    if not pairs:
        raise SelectionError("a blend must name an adapter, and is empty")
    return [(bind_adapter(part, package, strict=strict), weight) for part, weight in pairs]


def _is_one(adapter: object) -> bool:
    """Whether it is an adapter, and no blend."""
    return isinstance(adapter, (str, os.PathLike, Adapter, BoundAdapter))


def _are_pairs(given: object) -> bool:
    if not isinstance(given, (list, tuple)):
        return False
    return all(isinstance(pair, tuple) and len(pair) == 2 for pair in given)
