"""Adapters whose initial state was taken out of the base's weights before training. With the initial state taken out of
the adapter too, it is exact on the base as that was published.

PiSSA (Meng et al. 2024), OLoRA, CorDA, LoRA-GA; PEFT's `LoraModel.subtract_mutated_init`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Delta
from onnx_lora.adapters.methods.weights import widen
from onnx_lora.errors import AdapterFileError
from onnx_lora.kinds import Conv

__all__ = ["without_initial"]


def without_initial(trained: Adapter, initial: Adapter) -> Adapter:
    """`W = W0 + s · (B · A - B0 · A0)`, as factors side by side, of twice the rank.

    Raises AdapterFileError: the two are not of the same modules, shapes and scales, or hold more than LoRA.
    """
    problems: list[str] = []
    for module in sorted(set(trained.deltas) ^ set(initial.deltas)):
        problems.append(f"{module}: is in one of the two adapters only")
    after = _plain_lora(trained, problems)
    before = _plain_lora(initial, problems)
    for module in after.keys() & before.keys():
        problems.extend(_differences(module, after[module], before[module]))
    if problems:
        raise AdapterFileError(
            f"must be the adapter that began as {initial.origin.path}: of the same modules, ranks and scales; "
            "give the one that was saved before its training",
            path=trained.origin.path,
            problems=problems,
        )
    note = f"the base was changed before training; the initial adapter {initial.name!r} was taken out again"
    return replace(
        trained,
        deltas={module: _subtract(delta, before[module]) for module, delta in after.items()},
        notes=(*trained.notes, note),
    )


def _plain_lora(adapter: Adapter, problems: list[str]) -> dict[str, Delta]:
    """The adapter's factors; anything beside them is a problem."""
    plain: dict[str, Delta] = {}
    for module, delta in adapter.deltas.items():
        if isinstance(delta, Delta) and delta.magnitude is None:
            plain[module] = delta
    if adapter.changes or len(plain) < len(adapter.deltas):
        problems.append(f"{adapter.origin.path}: must be LoRA and nothing else, and is {adapter.origin.method}")
    return plain


def _differences(module: str, trained: Delta, initial: Delta) -> list[str]:
    """Why the initial factors cannot be taken out of the trained ones."""
    problems: list[str] = []
    shapes = f"{trained.a.shape}, {trained.b.shape}"
    initial_shapes = f"{initial.a.shape}, {initial.b.shape}"
    if trained.kind != initial.kind or shapes != initial_shapes:
        problems.append(f"{module}: has shapes {shapes}, and those of the initial adapter are {initial_shapes}")
    if trained.scale != initial.scale:
        problems.append(f"{module}: has scale {trained.scale}, and that of the initial adapter is {initial.scale}")
    if isinstance(trained.kind, Conv) and trained.rank != trained.b.shape[1]:
        problems.append(f"{module}: is a convolution in groups, whose weight PEFT does not change before training")
    return problems


def _subtract(trained: Delta, initial: Delta) -> Delta:
    """The pair of factors whose product is `B · A - B0 · A0`."""
    a = np.concatenate([trained.a, initial.a])
    b = np.concatenate([trained.b, -widen(initial.b)], axis=1)
    return replace(trained, a=a, b=b)
