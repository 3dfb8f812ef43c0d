"""What the processor that the tests run on can compute."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

__all__ = ["saturates_in_int8"]


@cache
def saturates_in_int8() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 are too small here: without VNNI it adds two of them in 16
    bits, which 255 · 127 · 2 does not fit."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 4])],
        [helper.make_tensor("w", TensorProto.INT8, [4, 4], [127] * 16)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, 4), 255, np.uint8)})
    return bool((found != 4 * 255 * 127).any())
