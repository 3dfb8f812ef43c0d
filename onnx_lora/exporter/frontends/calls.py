"""What a model does with its modules: how often it calls each, and whether they compute x · W0 and no more. It runs
PyTorch; it knows no graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from onnx_lora.exporter.checkpoint import Calls, overridden

if TYPE_CHECKING:
    from torch import nn

__all__ = ["count_calls"]


def count_calls(model: nn.Module, runs: Mapping[str, Callable[[], object]]) -> dict[str, Calls]:
    """For every graph of a model, what the run behind it does with each module."""
    found: dict[str, Calls] = {}
    for graph, run in runs.items():
        counts: Counter[str] = Counter()
        altered: set[str] = set()
        hooks = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_hook(partial(_count, counts, name)))
            if (plain := overridden(module)) is not None:
                hooks.append(module.register_forward_hook(partial(_compare, altered, name, plain)))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        found[graph] = Calls(counts, frozenset(altered))
    return found


def _count(counts: Counter[str], name: str, *_: Any) -> None:
    counts[name] += 1


def _compare(
    altered: set[str], name: str, plain: type[nn.Module], module: nn.Module, inputs: tuple[Any, ...], output: Any
) -> None:
    """Whether a forward of a module's own gives what its plain class gives."""
    import torch

    try:
        expected: Any = plain.forward(module, *inputs)
        same = torch.allclose(output, expected, rtol=1e-3, atol=1e-5)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        same = False  # it takes other inputs, or gives something else
    if not same:
        altered.add(name)
