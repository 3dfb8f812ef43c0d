"""A graph whose quantized products multiply in float32, to be compared with PyTorch."""

from __future__ import annotations

from pathlib import Path

import onnx

__all__ = ["rewrite_in_floats"]

# Of MatMulNBits' accuracy levels, the one that multiplies in float32.
_FLOAT32 = 1


def rewrite_in_floats(file: Path) -> bytes | None:
    """The graph of `file` with products of quantized weights in float32, where they are not: multiplied in int8,
    activations are rounded too, and a hundredth of an output is lost. None: it has no such products."""
    model = onnx.load(file, load_external_data=False)
    changed = False
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and attribute.i != _FLOAT32:
                attribute.i = _FLOAT32
                changed = True
    return model.SerializeToString() if changed else None
