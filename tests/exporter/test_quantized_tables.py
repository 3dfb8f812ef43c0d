"""A quantized table that is looked up gets a point: exact against its own dequantized rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnx_lora import AdapterSession, bind
from onnx_lora.adapters import Delta
from onnx_lora.exporter import attach
from onnx_lora.kinds import EMBEDDING
from tests.adapters.building import adapter
from tests.support.numbers import assert_close

ROWS, FEATURES, BLOCK = 10, 64, 16


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_table_gets_a_point(tmp_path: Path, bits: int) -> None:
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (ROWS, FEATURES * bits // 8), dtype=np.uint8)
    scales = random.random((ROWS, FEATURES // BLOCK), np.float32) + 0.1
    node = helper.make_node(
        "GatherBlockQuantized",
        ["embed.weight_Q", "ids", "embed.scales"],
        ["y"],
        name="/embed/Gather",
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        block_size=BLOCK,
        bits=bits,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", FEATURES])],
        [
            helper.make_tensor("embed.weight_Q", TensorProto.UINT8, data.shape, data.tobytes(), raw=True),
            helper.make_tensor("embed.scales", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    package = attach(tmp_path / "m.onnx", tmp_path / "out", targets=["embed"])
    point = package.points["embed"]
    assert (point.kind, point.in_features, point.out_features, point.per_row) == (EMBEDDING, ROWS, FEATURES, True)

    ids = np.array([[0, 3, 9], [1, 1, 5]])
    base = ort.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"ids": ids})[0]
    assert_close(package.module_weight(point)[ids], base)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((3, ROWS), (FEATURES, 3)))
    bound = bind(adapter({"embed": Delta(a, b, 0.5, EMBEDDING)}), package)
    session = AdapterSession(package)
    session.load_adapter("it", bound)
    expected = base + 0.5 * (b @ a).T[ids]
    assert_close(session.run(None, {"ids": ids}, adapter="it")[0], expected)
    assert_close(session.run(None, {"ids": ids}, adapter=[None, "it"])[0], np.stack([base[0], expected[1]]))
