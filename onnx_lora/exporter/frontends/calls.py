"""How often a model calls each of its modules. It runs PyTorch; it knows no graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["count_calls"]


def count_calls(model: nn.Module, runs: Mapping[str, Callable[[], object]]) -> dict[str, Mapping[str, int]]:
    """For every graph of a model, how often the run behind it calls each module; those never called are left out."""
    counts: dict[str, Mapping[str, int]] = {}
    for graph, run in runs.items():
        calls: Counter[str] = Counter()
        hooks = [module.register_forward_hook(partial(_count, calls, name)) for name, module in model.named_modules()]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        counts[graph] = calls
    return counts


def _count(calls: Counter[str], name: str, *_: Any) -> None:
    calls[name] += 1
