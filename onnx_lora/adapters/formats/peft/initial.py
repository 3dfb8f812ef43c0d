"""Adapters of which the initial state was taken out of the base's weights: exact on the base as it was published.

PiSSA (Meng et al. 2024), OLoRA, CorDA, LoRA-GA; PEFT's `LoraModel.subtract_mutated_init`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Delta
from onnx_lora.adapters.methods.arrays import wide
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
        problems += _differences(module, after[module], before[module])
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
        deltas={module: _difference(delta, before[module]) for module, delta in after.items()},
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
    problems = []
    if (trained.kind, trained.a.shape, trained.b.shape) != (initial.kind, initial.a.shape, initial.b.shape):
        problems.append(
            f"{module}: shapes {trained.a.shape}, {trained.b.shape} and, of the initial adapter, {initial.a.shape}, "
            f"{initial.b.shape}"
        )
    if trained.scale != initial.scale:
        problems.append(f"{module}: scale {trained.scale}, and {initial.scale} of the initial adapter")
    if isinstance(trained.kind, Conv) and len(trained.a) != trained.b.shape[1]:
        problems.append(f"{module}: a convolution in groups, of which PEFT changes no weight before training")
    return problems


def _difference(trained: Delta, initial: Delta) -> Delta:
    a = np.concatenate([trained.a, initial.a])
    return replace(trained, a=a, b=np.concatenate([trained.b, -wide(initial.b)], axis=1))
