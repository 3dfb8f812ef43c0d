"""BEFT: a bias of a linear module is trained.

BEFT (2025, arXiv:2509.15974): `b = b0 + c`, and the weight stays as it is. The reference is PEFT 0.21: `beft/layer.py`.
A module without a bias gets one in PEFT; here the package says that it has none, and the adapter is refused.
"""

from __future__ import annotations

from onnx_lora.adapters.adapter import Replacement
from onnx_lora.adapters.methods.method import Contribution, DocsRow, Method, Module, bare_parameters

__all__ = ["METHOD", "read_beft"]


def read_beft(module: Module) -> Contribution:
    """`beft_bias` `[1, out]`. Raises TensorError: it is missing, or no vector."""
    bias = module.vector("beft_bias")
    return Contribution(whole={f"{module.name}.bias": Replacement(bias, operation="add")})


METHOD = Method(
    peft_type="BEFT",
    name="BEFT",
    read=read_beft,
    docs=(DocsRow("`BEFT`", "added to the module's own bias; the package must have that replaceable"),),
    tensors=bare_parameters("beft_bias"),
)
