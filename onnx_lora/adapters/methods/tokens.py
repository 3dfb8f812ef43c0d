"""Trained tokens: single rows of a table are trained, new ones or a few of the old.

`W[i] = R[i]` for each trained token i, and the same in an output head that is tied to the table. The reference is PEFT
0.21: `trainable_tokens/layer.py`, `TrainableTokensLayer`; LoRA has the same layer by `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_lora.adapters.adapter import MatrixDelta
from onnx_lora.adapters.methods.endings import Endings
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Fields, Method, Module, bare_parameters
from onnx_lora.adapters.methods.weights import Floats, factors_pay, widen
from onnx_lora.adapters.problems import TensorError, abbreviate
from onnx_lora.kinds import EMBEDDING, Conv, Embedding, Kind
from onnx_lora.points import Array

__all__ = ["LORA_DOCS", "LORA_TOKENS", "METHOD", "TOKENS", "TokenRows", "read_lora_tokens", "read_tokens"]

# Names of tensors: the trained rows of the method of its own, and those beside LoRA; and the base's own rows.
TOKENS = "trainable_tokens_delta"
LORA_TOKENS = "token_adapter.trainable_tokens_delta"
_TOKENS_BEFORE = "trainable_tokens_original"


@dataclass(frozen=True)
class TokenRows:
    """`rows` `[n, features]`, which replace those that `indices` name.

    PEFT puts them into every weight that is tied to the table too: an output head's, whose rows are its outputs.
    `of_kind` gives the same change for such a weight.
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
        changed = widen(weight).copy()
        changed[list(self.indices)] = widen(self.rows)
        return changed

    def as_factors(self, weight: Array) -> MatrixDelta | None:
        """A rank for each token: one factor chooses the token's row, the other is what the row changes by."""
        indices = list(self.indices)
        count = len(indices)
        if count == 0 or not factors_pay(count, weight.shape):
            return None
        change: Floats = widen(self.rows) - widen(weight)[indices]
        chosen = np.zeros((count, len(weight)), change.dtype)
        chosen[np.arange(count), indices] = 1
        if isinstance(self.kind, Embedding):
            return MatrixDelta(chosen, change.T)
        return MatrixDelta(change, chosen.T)

    def output_scale(self) -> Array | None:
        return None


def read_tokens(module: Module) -> Contribution:
    """`trainable_tokens_delta` `[n, features]`, the rows themselves, with `token_indices` of the config.

    Raises TensorError: the config does not give n tokens, each once.
    """
    return _read_rows(module, TOKENS, module.fields.get("token_indices"), "token_indices")


def read_lora_tokens(module: Module) -> Contribution:
    """The rows beside LoRA, `token_adapter.trainable_tokens_delta` `[n, features]`, with `trainable_token_indices` of
    the config: a list for the input embedding, or a list for each of some modules. As in PEFT, the modules are named by
    the end of their names, without a dot before it.

    Raises TensorError: the config does not give as many tokens as there are rows, each once.
    """
    indices = module.fields.get("trainable_token_indices")
    if isinstance(indices, dict):
        number = module.fields.once(_modules_with_tokens).first(module.name)
        indices = None if number is None else list(indices.values())[number]
    return _read_rows(module, LORA_TOKENS, indices, "trainable_token_indices")


def _modules_with_tokens(fields: Fields) -> Endings:
    return Endings(fields.values["trainable_token_indices"])


def _read_rows(module: Module, tensor: str, indices: Any, field: str) -> Contribution:
    rows = module.tensor(tensor, 2)
    if not _are_tokens(indices):
        raise TensorError(f"{field} of the config must give its tokens, each once, and gives {abbreviate(indices)}")
    if len(indices) != len(rows):
        raise TensorError(f"{tensor} must have a row for each of {len(indices)} tokens, and has shape {rows.shape}")
    return Contribution(change=TokenRows(tuple(indices), rows))


def _are_tokens(indices: Any) -> bool:
    if not isinstance(indices, Sequence) or isinstance(indices, str):
        return False
    are_numbers = all(type(index) is int and index >= 0 for index in indices)
    return are_numbers and len(set(indices)) == len(indices)


LORA_DOCS = DocsRow(
    "`trainable_token_indices`",
    "delta of as many ranks as tokens while that is smaller than the table, else fold. PEFT puts them into a tied "
    "output head too: so do we, and where the package has no point there to tell, they are refused",
)

METHOD = Method(
    peft_type="TRAINABLE_TOKENS",
    name="trained tokens",
    read=read_tokens,
    docs=(DocsRow("`TRAINABLE_TOKENS`", "as `trainable_token_indices`"),),
    tensors=bare_parameters(TOKENS, _TOKENS_BEFORE),
    unread=frozenset({_TOKENS_BEFORE}),
    fields=frozenset({"token_indices"}),
)
