"""`nn.MultiheadAttention`'s `out_proj`: its weight is read and the module is never called, so PEFT has no effect."""

from __future__ import annotations

from collections.abc import Collection, Iterable

__all__ = ["NEVER_CALLED", "find_never_called", "is_never_called"]

# Why such a module gets no point.
NEVER_CALLED = "nn.MultiheadAttention reads its weight and never calls it, so PEFT has no effect there"

# Parameters of the attention itself, beside which the projection lies.
_BESIDE = ("in_proj_weight", "in_proj_bias")


def find_never_called(parameters: Iterable[str]) -> set[str]:
    """The modules that are never called, by the names of parameters beside them."""
    found: set[str] = set()
    for name in parameters:
        for beside in _BESIDE:
            if name.endswith(f".{beside}"):
                found.add(name.removesuffix(beside) + "out_proj")
    return found


def is_never_called(module: str, parameters: Collection[str]) -> bool:
    """Whether a module is such a projection, by the names of a model's parameters."""
    parent, _, name = module.rpartition(".")
    if name != "out_proj":
        return False
    return any(f"{parent}.{beside}".lstrip(".") in parameters for beside in _BESIDE)
