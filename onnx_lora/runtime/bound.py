"""Whatever a caller gives as an adapter, bound to a package. It knows no session and no graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias, Union

from onnx_lora.adapters import Adapter, BoundAdapter, bind, read_adapter
from onnx_lora.adapters.compose import make_blend
from onnx_lora.errors import SelectionError
from onnx_lora.package import Package

__all__ = ["AnyAdapter", "AnyPackage", "Mixture", "as_bound", "mixed", "opened"]

AnyAdapter: TypeAlias = Union[str, "os.PathLike[str]", Adapter, BoundAdapter]
AnyPackage: TypeAlias = Union[str, "os.PathLike[str]", Package]

# Several adapters and their weights. Adapters already read cannot be keys: they go in pairs.
Mixture: TypeAlias = Mapping[AnyAdapter, float] | Sequence[tuple[AnyAdapter, float]]


def opened(package: AnyPackage) -> Package:
    return package if isinstance(package, Package) else Package.open(package)


def as_bound(adapter: AnyAdapter, package: Package, *, name: str | None = None, strict: bool = False) -> BoundAdapter:
    """Read and bind what is not yet; what is, is checked to be bound to an equal package. `strict` as in `bind`.

    Raises AdapterError: it cannot be read, or does not fit.
    """
    if isinstance(adapter, Adapter | BoundAdapter):
        return bind(adapter, package, strict=strict)
    if isinstance(adapter, (str, os.PathLike)):
        return bind(read_adapter(adapter, name=name), package, strict=strict)
    raise SelectionError(f"an adapter must be a path, an Adapter or a BoundAdapter, and is a {type(adapter).__name__}")


def mixed(adapter: AnyAdapter | Mixture, package: Package, *, strict: bool = False) -> BoundAdapter:
    """One adapter, or several blended into one. `strict` as in `bind`.

    Raises AdapterError: one cannot be read, or does not fit. SelectionError: they cannot be blended.
    """
    if isinstance(adapter, (str, os.PathLike, Adapter, BoundAdapter)):
        return as_bound(adapter, package, strict=strict)
    pairs = list(adapter.items()) if isinstance(adapter, Mapping) else adapter
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise SelectionError(
            "a blend must be a mapping from adapters to weights, or a list of (adapter, weight) pairs, "
            f"and is a {type(adapter).__name__}"
        )
    if not pairs:
        raise SelectionError("a blend must name an adapter, and is empty")
    return make_blend([(as_bound(part, package, strict=strict), weight) for part, weight in pairs], name="blend")
