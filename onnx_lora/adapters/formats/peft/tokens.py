"""Trained tokens of PEFT, beside LoRA or alone: which rows of which table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx_lora.adapters.formats.files.reading import shown
from onnx_lora.adapters.formats.peft.method import Module, Part, TensorError
from onnx_lora.adapters.formats.peft.patterns import Endings
from onnx_lora.adapters.methods.tokens import TokenRows

__all__ = ["LORA_TOKENS", "TOKENS", "TOKENS_BEFORE", "lora_tokens", "trainable_tokens"]

LORA_TOKENS = "token_adapter.trainable_tokens_delta"
TOKENS = "trainable_tokens_delta"
TOKENS_BEFORE = "trainable_tokens_original"  # the base's own rows, which nothing reads


def lora_tokens(module: Module) -> Part:
    """`trainable_token_indices`: a list, for the input embedding, or one for each of some modules."""
    indices = module.config.fields.get("trainable_token_indices")
    if isinstance(indices, dict):
        # As PEFT matches them: by the end of the name, without a dot before it.
        number = module.config.once(_modules_with_tokens).first(module.name)
        indices = None if number is None else list(indices.values())[number]
    return _rows(module, LORA_TOKENS, indices, "trainable_token_indices")


def _modules_with_tokens(fields: Mapping[str, Any]) -> Endings:
    return Endings(fields["trainable_token_indices"])


def trainable_tokens(module: Module) -> Part:
    """The method of its own."""
    return _rows(module, TOKENS, module.config.fields.get("token_indices"), "token_indices")


def _rows(module: Module, tensor: str, indices: Any, field: str) -> Part:
    rows = module.tensor(tensor, 2)
    if not _are_tokens(indices):
        raise TensorError(f"{field} of the config must give its tokens, each once, and gives {shown(indices)}")
    if len(indices) != len(rows):
        raise TensorError(f"{tensor} must have a row for each of {len(indices)} tokens, and has shape {rows.shape}")
    return Part(change=TokenRows(tuple(indices), rows))


def _are_tokens(indices: Any) -> bool:
    if not isinstance(indices, Sequence) or isinstance(indices, str):
        return False
    return all(type(index) is int and index >= 0 for index in indices) and len(set(indices)) == len(indices)
