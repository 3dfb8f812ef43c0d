"""What a model does with its modules: how often it calls each, and whether they compute x · W0 and no more. It runs
PyTorch; it knows no graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.exporter.weights.torch_weights import overridden_class

if TYPE_CHECKING:
    from torch import nn

__all__ = ["count_calls"]


def count_calls(model: nn.Module, runs: Mapping[str, Callable[[], object]]) -> dict[str, Calls]:
    """For every graph of a model, what the run behind it does with each module."""
    modules = dict(model.named_modules())
    plain = {name: kind for name, module in modules.items() if (kind := overridden_class(module)) is not None}
    shared = _sharing(modules)
    found: dict[str, Calls] = {}
    for graph, run in runs.items():
        counts: Counter[str] = Counter()
        altered: set[str] = set()
        hooks = [module.register_forward_hook(partial(_count, counts, name)) for name, module in modules.items()]
        for name, kind in plain.items():
            hooks.append(modules[name].register_forward_hook(partial(_compare, altered, name, kind)))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        found[graph] = Calls(counts, frozenset(altered), frozenset(plain), shared)
    return found


def _sharing(modules: Mapping[str, nn.Module]) -> dict[str, frozenset[str]]:
    """Modules of one class that have one weight together, by each of their names: an exporter makes one of two that
    compute the same."""
    groups: dict[tuple[int, type], set[str]] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if weight is not None:
            groups.setdefault((id(weight), type(module)), set()).add(name)
    several = [frozenset(names) for names in groups.values() if len(names) > 1]
    return {name: names for names in several for name in names}


def _count(counts: Counter[str], name: str, *_: Any) -> None:
    counts[name] += 1


def _compare(
    altered: set[str], name: str, plain: type[nn.Module], module: nn.Module, inputs: tuple[Any, ...], output: Any
) -> None:
    """Whether a forward of a module's own gives what its plain class gives."""
    import torch

    try:
        expected: Any = plain.forward(module, *inputs)
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        same = torch.allclose(output, expected, rtol=1e-3, atol=1e-5 * largest)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        same = False  # it takes other inputs, or gives something else
    if not same:
        altered.add(name)
