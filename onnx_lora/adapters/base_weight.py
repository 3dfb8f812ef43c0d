"""Whether a whole weight is the one that the base has already. It knows a package's digests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnx_lora.points import Array, digest

if TYPE_CHECKING:
    from onnx_lora.manifest import KnownWeight
    from onnx_lora.package import Package
    from onnx_lora.points import InjectionPoint, WholeWeight

__all__ = ["is_base_weight"]


def is_base_weight(name: str, value: Array, package: Package) -> bool:
    """Whether a whole weight is equal to the base's own, in the type that the package keeps it in."""
    module, _, parameter = name.rpartition(".")
    owner: InjectionPoint | WholeWeight | KnownWeight | None = package.replaceable.get(name)
    if owner is None and parameter == "weight":
        owner = package.points.get(module) or package.tables.get(module)
    if owner is None:
        return False
    with np.errstate(over="ignore"):
        return digest(value.astype(owner.dtype)) == owner.sha256
