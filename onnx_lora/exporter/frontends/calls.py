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
    overridden: dict[str, type[nn.Module]] = {}
    for name, module in modules.items():
        plain = overridden_class(module)
        if plain is not None:
            overridden[name] = plain
    shared = _find_sharing(modules)
    found: dict[str, Calls] = {}
    for graph, run in runs.items():
        counts, altered = _watch(run, modules, overridden)
        found[graph] = Calls(counts, altered, frozenset(overridden), shared)
    return found


def _watch(
    run: Callable[[], object], modules: Mapping[str, nn.Module], overridden: Mapping[str, type[nn.Module]]
) -> tuple[Counter[str], frozenset[str]]:
    """How often one run calls each module, and which of the `overridden` ones compute something else than their plain
    class."""
    counts: Counter[str] = Counter()
    altered: set[str] = set()
    hooks: list[Any] = []
    for name, module in modules.items():
        hooks.append(module.register_forward_hook(partial(_count, counts, name)))
    for name, plain in overridden.items():
        hooks.append(modules[name].register_forward_hook(partial(_compare, altered, name, plain)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counts, frozenset(altered)


def _find_sharing(modules: Mapping[str, nn.Module]) -> dict[str, frozenset[str]]:
    """Modules of one class that have one weight together, by each of their names: an exporter makes one of two that
    compute the same."""
    groups: dict[tuple[int, type], set[str]] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if weight is not None:
            key = id(weight), type(module)
            groups.setdefault(key, set()).add(name)
    sharing: dict[str, frozenset[str]] = {}
    for names in groups.values():
        if len(names) > 1:
            sharing.update(dict.fromkeys(names, frozenset(names)))
    return sharing


def _count(counts: Counter[str], name: str, *_: Any) -> None:
    counts[name] += 1


def _compare(
    altered: set[str], name: str, plain: type[nn.Module], module: nn.Module, inputs: tuple[Any, ...], output: Any
) -> None:
    """Note a module in `altered` whose own forward gives something else than its plain class's."""
    import torch

    try:
        expected: Any = plain.forward(module, *inputs)
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        same = torch.allclose(output, expected, rtol=1e-3, atol=1e-5 * largest)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        same = False  # it takes other inputs, or gives something else
    if not same:
        altered.add(name)
