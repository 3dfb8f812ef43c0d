"""SHiRA: a few numbers of the weight are changed, at places that are kept.

SHiRA (Bhardwaj et al. 2024), section 3: `W = W0 + S`, with S zero but for n numbers. There is no scale. The reference
is PEFT 0.21: `shira/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import explain_kind, widen
from onnx_lora.kinds import Kind, Linear
from onnx_lora.points import Array

__all__ = ["METHOD", "SHiRA", "read_shira"]


@dataclass(frozen=True)
class SHiRA:
    """`values` `[n]` added at `places` `[2, n]`: outputs and inputs."""

    places: Array
    values: Array

    @property
    def method(self) -> str:
        return "SHiRA"

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if not isinstance(kind, Linear) or len(shape) != 2:
            return explain_kind("SHiRA", "linear modules", shape, kind)
        places = self.places.astype(np.int64)
        if places.size == 0:
            return None
        least = int(places.min())
        most_output, most_input = (int(most) for most in places.max(axis=1))
        if least >= 0 and most_output < shape[0] and most_input < shape[1]:
            return None
        return (
            f"SHiRA's places must lie in a weight of shape {shape}, and reach {(most_output, most_input)} "
            f"(from {least})"
        )

    def apply_to(self, weight: Array) -> Array:
        changed = widen(weight).copy()
        outputs, inputs = self.places.astype(np.int64)
        np.add.at(changed, (outputs, inputs), widen(self.values))
        return changed

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        del weight
        return None

    def output_scale(self) -> Array | None:
        return None


def read_shira(module: Module) -> Contribution:
    """`shira_weight` `[n]` and `shira_indices` `[2, n]`, whole numbers of any type.

    Raises TensorError: one of them is missing, or they are not as many, or a place is no whole number.
    """
    values, places = module.tensor("shira_weight", 1), module.tensor("shira_indices", 2)
    module.must(places.shape == (2, values.size), "SHiRA must have a place for each value")
    numbers = places.astype(np.float64)
    are_whole = np.isfinite(numbers) & (numbers == np.floor(numbers))
    module.must(bool(are_whole.all()), "SHiRA's places must be whole")
    return Contribution(change=SHiRA(places.astype(np.int64), values))


METHOD = Method(
    peft_type="SHIRA",
    name="SHiRA",
    read=read_shira,
    docs=(DocsRow("`SHIRA`", "fold"),),
    tensors=bare_parameters("shira_indices", "shira_weight"),
    integers=frozenset({"shira_indices"}),
    fields=frozenset({"mask_type", "r", "random_seed"}),
)
