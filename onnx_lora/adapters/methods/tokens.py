"""Single rows of a table trained: new tokens, or a few of the old. PEFT's `TrainableTokensLayer`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.shapes import Floats, wide
from onnx_lora.kinds import EMBEDDING, Conv, Embedding, Kind
from onnx_lora.points import Array

__all__ = ["TokenRows"]


@dataclass(frozen=True)
class TokenRows:
    """`rows` `[n, features]` in the place of those that `indices` name.

    PEFT puts them into every weight that is tied to this one too (an output head's, whose rows are its outputs): there
    `of_kind` gives the same change for the other kind.
    """

    indices: tuple[int, ...]
    rows: Array
    kind: Kind = EMBEDDING

    @property
    def method(self) -> str:
        return "trained tokens"

    def of_kind(self, kind: Kind) -> TokenRows:
        return replace(self, kind=kind)

    def explain_misfit(self, shape: tuple[int, ...], kind: Kind) -> str | None:
        if isinstance(kind, Conv) or len(shape) != 2 or shape[1] != self.rows.shape[1]:
            return f"trained tokens of shape {self.rows.shape} must meet a table as wide, and this has shape {shape}"
        if self.indices and max(self.indices) >= shape[0]:
            return f"token {max(self.indices)} is trained, and the table has shape {shape}; export the resized base"
        return None

    def apply_to(self, weight: Array) -> Array:
        merged = wide(weight).copy()
        merged[list(self.indices)] = wide(self.rows)
        return merged

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """One column a token, chosen by its row: no larger than the table while there are few of them."""
        count, (rows, features) = len(self.indices), weight.shape
        if not count or count * (rows + features) > rows * features:
            return None
        change: Floats = wide(self.rows) - wide(weight)[list(self.indices)]
        chosen = np.zeros((count, rows), change.dtype)
        chosen[np.arange(count), list(self.indices)] = 1
        if isinstance(self.kind, Embedding):
            return MatrixDelta(chosen, change.T, 1.0)
        return MatrixDelta(change, chosen.T, 1.0)

    def output_scale(self) -> Array | None:
        return None
