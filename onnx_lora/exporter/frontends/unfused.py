"""Torch's exporters without the pass that multiplies a batch norm into the weight before it. It reads no graph.

PEFT's change goes in between the two: where they are one, a convolution can have no point, and a norm no whole weight.
ONNX Runtime multiplies them itself when a session starts, wherever nothing stands between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onnx_lora.exporter.graph.scopes import FUSING_NORMS

__all__ = ["without_norm_fusion"]

# Of TorchScript's passes over a graph in evaluation, the one that multiplies norms into convolutions, and does no more.
_TORCHSCRIPT_PASS = "_jit_pass_onnx_eval_peephole"

# The rules of onnxscript's rewriter, behind dynamo.
_DYNAMO_RULES = "_DEFAULT_REWRITE_RULES"


@contextmanager
def without_norm_fusion() -> Iterator[None]:
    """Keep batch norms in the graphs that are exported within the block, by TorchScript or by dynamo. Neither has an
    option for it; where a library lost what is looked for, it is left as it is. Imports torch and onnxscript."""
    import torch
    from onnxscript import rewriter

    rules = [rule for rule in getattr(rewriter, _DYNAMO_RULES, ()) if FUSING_NORMS not in str(rule)]
    with _replaced(torch._C, _TORCHSCRIPT_PASS, _keep_parameters), _replaced(rewriter, _DYNAMO_RULES, tuple(rules)):
        yield


def _keep_parameters(graph: Any, parameters: Any) -> Any:  # noqa: ARG001 - the pass that is replaced takes both
    return parameters


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Have another value under a name of `owner`'s, if it has one, for as long as the block runs."""
    before = getattr(owner, name, None)
    if before is None:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
