"""Super-Tuning: a few numbers of the weight are changed, those that were largest; as Supra with a pair of factors.

Super-Tuning (2026, arXiv:2607.09287): `W = W0 + S`, with S zero but for n numbers; Supra: `W = W0 + S + alpha / r · B ·
A`. The reference is PEFT 0.21: `supertuning/layer.py`, `get_delta_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import Floats, explain_kind, explain_sizes, widen
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "SuperTuning", "read_supertuning"]


@dataclass(frozen=True)
class SuperTuning:
    """`values` `[n]` added at `places` `[n]` of the weight's numbers in a row, output by output; and `factors`, a
    `[r, in]` and b `[out, r]` with the scale in it."""

    places: NDArray[np.int64]
    values: Array
    factors: tuple[Floats, Floats] | None

    @property
    def method(self) -> str:
        return "Super-Tuning"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return explain_kind("Super-Tuning", "linear modules", shape, kind)
        least, most = int(self.places.min()), int(self.places.max())
        if least < 0 or most >= shape[0] * shape[1]:
            return f"Super-Tuning's places must lie in a weight of shape {shape}, and reach from {least} to {most}"
        if self.factors is None:
            return None
        a, b = self.factors
        return explain_sizes("Super-Tuning", (len(b), a.shape[1]), shape)

    def apply_to(self, weight: Array) -> Array:
        changed = widen(weight).copy()
        np.add.at(changed.reshape(-1), self.places, widen(self.values))
        if self.factors is None:
            return changed
        a, b = self.factors
        return changed + b @ a

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def read_supertuning(module: Module) -> Contribution:
    """`supertuning_values` `[n]` and `supertuning_indices` `[n]`, whole numbers; with `r` of the config the factors
    `supertuning_lora_A` `[r, in]` and `supertuning_lora_B` `[out, r]`.

    Raises TensorError: one of them is missing, a place is no whole number, or the shapes do not fit.
    """
    module.must(
        module.has("supertuning_indices"),
        "PEFT chooses the places anew from the base's weights; save it again with save_precomputed_indices=True",
    )
    values, places = module.tensor("supertuning_values", 1), module.tensor("supertuning_indices", 1)
    module.must(places.size == values.size > 0, "Super-Tuning must have a place for each value")
    numbers = places.astype(np.float64)
    are_whole = np.isfinite(numbers) & (numbers == np.floor(numbers))
    module.must(bool(are_whole.all()), "Super-Tuning's places must be whole")
    return Contribution(change=SuperTuning(places.astype(np.int64), values, _read_factors(module)))


def _read_factors(module: Module) -> tuple[Floats, Floats] | None:
    if module.fields.get("r") is None:
        return None
    rank, alpha = module.count("r"), module.number("lora_alpha", least=-1e30)
    a, b = module.tensor("supertuning_lora_A", 2), module.tensor("supertuning_lora_B", 2)
    fits = len(a) == b.shape[1] == rank and a.size > 0 and b.size > 0
    module.must(fits, f"Super-Tuning must have a pair of factors of the config's r, {rank}")
    return widen(a), widen(b) * np.float32(lora_scale(alpha, rank))


METHOD = Method(
    peft_type="SUPERTUNING",
    name="Super-Tuning",
    read=read_supertuning,
    docs=(DocsRow("`SUPERTUNING`", "fold; refused without its places (`save_precomputed_indices=False`)"),),
    tensors=bare_parameters("supertuning_indices", "supertuning_values")
    | dict.fromkeys(("supertuning_lora_A", "supertuning_lora_B"), ("weight",)),
    integers=frozenset({"supertuning_indices"}),
    fields=frozenset({"lora_alpha", "lora_dropout", "r", "save_precomputed_indices", "select_top", "sparsity"}),
)
