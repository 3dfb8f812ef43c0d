"""What models of transformers say of themselves: which modules are their output layers."""

from __future__ import annotations

from typing import Any

from onnx_lora.heads import TASK_HEADS

__all__ = ["heads_of"]


def heads_of(model: Any) -> frozenset[str]:
    """The output layers that PEFT leaves out of "all-linear"."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return frozenset(name for name, module in model.named_modules() if module is output)
    return frozenset(name for name in TASK_HEADS["SEQ_CLS"] if hasattr(model, name))
