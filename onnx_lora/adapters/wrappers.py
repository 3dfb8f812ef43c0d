"""The parts of names that wrappers leave in a model's state: of torch.compile, of FSDP and of activation checkpointing,
whose names no module of a model has; and `module`, of DDP and DataParallel, which one may have."""

from __future__ import annotations

__all__ = ["without_module", "without_wrappers"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_MODULE = frozenset({"module"})


def without_wrappers(name: str) -> str:
    """The name without the parts that only wrappers are called by."""
    return _without(_WRAPPERS, name)


def without_module(name: str) -> str:
    """The name without any wrapper's part, `module` among them."""
    return _without(_WRAPPERS | _MODULE, name)


def _without(wrappers: frozenset[str], name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)
