"""LN tuning: layer norms are trained whole.

Tuning LayerNorm (Zhao et al. 2023). All tensors of its files are copies of whole parameters, which are read as such
before any method is asked. The reference is PEFT 0.21: `ln_tuning/layer.py`.
"""

from __future__ import annotations

from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module
from onnx_lora.adapters.problems import TensorError

__all__ = ["METHOD"]


def _read_nothing(module: Module) -> Contribution:
    """Raises TensorError: LN tuning has no tensors but whole parameters."""
    raise TensorError(f"LN tuning has whole parameters only; has {', '.join(module.tensors)}")


METHOD = Method(
    peft_type="LN_TUNING",
    name="LN tuning",
    read=_read_nothing,
    docs=(DocsRow("`LN_TUNING`", "whole weights"),),
    tensors={},
)
