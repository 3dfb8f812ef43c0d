"""Names of tensors that PEFT's rules for whole files need, beside the methods that read them."""

from __future__ import annotations

__all__ = ["LORA_TOKENS", "TOKENS"]

# Trained rows of a table: the method of its own, and beside LoRA.
TOKENS = "trainable_tokens_delta"
LORA_TOKENS = "token_adapter.trainable_tokens_delta"
