"""Adapters that a verification tries: as PEFT loads them into the model, and as the graphs take them. It runs no
graph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnx_lora.errors import ModelError
from onnx_lora.exporter.verification.random_adapters import peft_failures
from onnx_lora.strength import as_strength, weight_in

if TYPE_CHECKING:
    from onnx_lora.points import Array

__all__ = ["TriedAdapter", "put_on_model"]


@dataclass(frozen=True)
class TriedAdapter:
    """An adapter to compare: `folder`, a PEFT folder, is what PEFT loads into the model; `tensors`, by the names of the
    package's inputs, is what the graphs get. `weight`: what it is multiplied with, in a folded model; a number, or one
    for each of some groups of modules, as in a call."""

    name: str
    folder: str | os.PathLike[str]
    tensors: Mapping[str, Array] = field(default_factory=dict)
    weight: float | Mapping[str, float] = 1.0


@contextmanager
def put_on_model(model: Any, adapters: Sequence[TriedAdapter]) -> Iterator[None]:
    """Let PEFT load adapters into the model, all of them at once with their weights, for as long as the block runs. The
    model is as it was afterwards.

    Raises ModelError: PEFT cannot load one, or blend them. MissingDependencyError: it is not installed.
    """
    # PEFT writes whole tables over the model's own, and unloads without giving them back.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with peft_failures():
        import peft

        first, *others = adapters
        names = [f"adapter{number}" for number in range(len(adapters))]
        tuned = peft.PeftModel.from_pretrained(model, os.fspath(first.folder), adapter_name=names[0]).eval()
        for name, other in zip(names[1:], others, strict=True):
            tuned.load_adapter(os.fspath(other.folder), adapter_name=name)
        if others:
            tuned.base_model.set_adapter(names)
    try:
        for name, adapter in zip(names, adapters, strict=True):
            if adapter.weight != 1.0:
                _weigh(tuned, name, adapter)
        yield
    finally:
        with peft_failures():
            tuned.unload()
            model.load_state_dict(before)
            model.eval()


def _weigh(tuned: Any, name: str, adapter: TriedAdapter) -> None:
    """Multiply an adapter's scales in PEFT's layers. Raises ModelError: they have none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Modules of the model itself may have a `scaling` too: Llama's attention keeps the one of its scores there.
    tuners = {
        module: layer for module, layer in tuned.get_base_model().named_modules() if isinstance(layer, BaseTunerLayer)
    }
    layers = {module: layer for module, layer in tuners.items() if name in getattr(layer, "scaling", {})}
    if not layers:
        raise ModelError(
            f"PEFT cannot weigh the adapter {adapter.name!r}, which is no LoRA; compare it at weight 1",
            path=adapter.folder,
        )
    strength = as_strength(adapter.weight)
    for module, layer in layers.items():
        layer.scaling[name] *= weight_in(strength, module)
