"""Shapes that a graph says itself: believed where ONNX's rules find nothing else, so that rows are possible where no
tool can infer the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnx_lora import Package
from onnx_lora.exporter import attach
from tests.support.graphs import lora, random, save
from tests.support.numbers import assert_close

node = helper.make_node

# Attention's merged heads: [batch, seq, 2, 4] becomes [batch · seq, 8], by a Reshape that no tool sees through.
_NODES = [
    node("Reshape", ["x", "four"], ["heads"]),
    node("Reshape", ["heads", "flat_shape"], ["flat"]),
    node("Gemm", ["flat", "w"], ["h"], name="/q/Gemm"),
    node("Shape", ["x"], ["sizes"]),
    node("Reshape", ["h", "sizes"], ["y"]),
]
_TOLD: Mapping[str, Sequence[int | str]] = {
    "heads": ["batch", "seq", 2, 4],
    "flat": ["batch*seq", 8],
    "h": ["batch*seq", 8],
    "y": ["batch", "seq", 8],
}


def _package(folder: Path, told: Mapping[str, Sequence[int | str]]) -> Package:
    weights = {"w": random(8, 8), "four": np.array([0, 0, 2, 4]), "flat_shape": np.array([-1, 8])}
    file = save(
        folder / "model.onnx",
        _NODES,
        weights,
        inputs={"x": ["batch", "seq", 8]},
        outputs={"y": ["batch", "seq", 8]},
    )
    model = onnx.load(file)
    for name, shape in told.items():
        if name != "y":
            model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    if told:
        model.graph.value_info.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, [3]))
    onnx.save(model, file)
    return attach(file, folder / "package")


def test_merged_heads_have_rows(tmp_path: Path) -> None:
    package = _package(tmp_path, _TOLD)
    (point,) = package.points.values()
    assert point.per_row
    x, tensors = random(2, 3, 8, seed=5), lora(point.module, 8, 8, rows=2)
    session = ort.InferenceSession(package.path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x, **tensors})
    weight = session.run(None, {"x": np.eye(8, dtype=np.float32)[None]})[0][0]
    a, b = tensors.values()
    assert_close(found, x @ weight + x @ a @ b)


@pytest.mark.parametrize(
    "wrong",
    [{"heads": ["seq", "batch", 2, 4]}, {"flat": ["batch", 8, 1]}, {"h": ["batch", 7]}],
    ids=str,
)
def test_shapes_that_onnx_contradicts_are_not_believed(
    tmp_path: Path, wrong: Mapping[str, Sequence[int | str]]
) -> None:
    plain = _package(tmp_path / "plain", {})
    package = _package(tmp_path / "told", {**_TOLD, **wrong})
    assert [point.per_row for point in package.points.values()] == [point.per_row for point in plain.points.values()]
