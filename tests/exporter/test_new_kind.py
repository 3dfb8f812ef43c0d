"""A new kind of module is its class, and what the exporter registers for it: nothing else is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lora import Package, kinds
from onnx_lora.exporter import attach
from onnx_lora.exporter.graph.product import Operand, Product, Unfit
from onnx_lora.exporter.graph.values import initializer_behind, numpy_type_of, rows_and_columns
from onnx_lora.exporter.graph_kinds import graph_kind
from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind, graph_kinds, register
from onnx_lora.exporter.surgery.branches import BranchInputs, broadcast
from onnx_lora.exporter.surgery.surgeon import Surgeon
from tests.support.graphs import lora, random
from tests.support.numbers import assert_close, assert_same_bits


@dataclass(frozen=True, slots=True)
class Scaled(kinds.Linear):
    """`y = factor · x · W0`, as ONNX Runtime's FusedMatMul computes it. PEFT would scale its delta alike."""

    factor: float = 1.0

    name: ClassVar[str] = "scaled"
    noun: ClassVar[str] = "a scaled linear module"


def _read(node: ir.Node) -> Product | Unfit | None:
    weight = initializer_behind(node.inputs[1])
    if weight is None:
        return None
    if node.attributes.get_int("transA", 0) or node.attributes.get_int("transB", 0):
        return Unfit("a factor is transposed", weight)
    rows, columns = rows_and_columns(weight)
    return Product(
        node=node,
        reader=node,
        output=node.outputs[0],
        weight=Operand(node, 1, weight),
        transposed=False,
        inputs=rows,
        outputs=columns,
        dtype=numpy_type_of(weight),
        kind=Scaled(round(node.attributes.get_float("alpha", 1.0), 6)),
    )


class _Branch:
    def build_delta(self, surgeon: Surgeon, given: BranchInputs) -> ir.Value:
        assert isinstance(given.product.kind, Scaled)
        low = surgeon.op("MatMul", given.view.value, broadcast(surgeon, given.a, given.view.rank), name="low")
        delta = surgeon.op("MatMul", low, broadcast(surgeon, given.b, given.view.rank), name="delta")
        factor = surgeon.number(given.product.kind.factor, np.dtype(given.product.dtype))
        return surgeon.op("Mul", delta, factor, name="scaled")

    def shape_scale(self, surgeon: Surgeon, scale: ir.Value, product: Product, rank: int, name: str) -> ir.Value:
        return broadcast(surgeon, scale, rank)

    def shape_bias(self, surgeon: Surgeon, bias: ir.Value, product: Product, name: str) -> ir.Value:
        return bias


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_kinds()
    monkeypatch.setattr(graph_kind, "_registered", dict(graph_kind._registered))
    monkeypatch.setitem(kinds.KINDS, Scaled.name, Scaled)
    register(GraphKind(kind=Scaled, forms={("com.microsoft", "FusedMatMul"): _read}, builder=_Branch()))


def _file(folder: Path, weight: np.ndarray[Any, Any]) -> Path:
    node = helper.make_node(
        "FusedMatMul", ["x", "w"], ["y"], name="/m/q/FusedMatMul", domain="com.microsoft", alpha=0.5
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", 6])
    graph = helper.make_graph([node], "graph", [x], [y], [numpy_helper.from_array(weight, "w")])
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=8), folder / "m.onnx")
    return folder / "m.onnx"


def _run(package: Package, feeds: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(str(package.path / package.graph().file))
    return session.run(None, feeds)[0]  # type: ignore[no-any-return]


@pytest.mark.usefixtures("scaled")
def test_a_registered_kind_gets_a_point_that_works(tmp_path: Path) -> None:
    weight, x = random(8, 6), random(3, 5, 8)
    package = attach(_file(tmp_path, weight), tmp_path / "out", targets=["q"])
    assert package.points["m.q"].kind == Scaled(0.5)
    assert Package.open(package.path).points["m.q"].kind == Scaled(0.5)
    base = _run(package, {"x": x})
    assert_same_bits(base, 0.5 * (x @ weight))
    one = lora("m.q", 8, 6)
    a, b = one.values()
    assert_close(_run(package, {"x": x, **one}), base + 0.5 * (x @ (a[0] @ b[0])))


@pytest.mark.usefixtures("scaled")
def test_all_linear_means_only_kinds_that_say_they_are_linear(tmp_path: Path) -> None:
    package = attach(_file(tmp_path, random(8, 6)), tmp_path / "out", targets="all")
    assert list(package.points) == ["m.q"]
    with pytest.raises(Exception, match="none could be placed"):
        attach(_file(tmp_path, random(8, 6)), tmp_path / "linear")


def test_without_it_the_node_is_named_among_those_that_get_no_point(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="FusedMatMul gets no point yet"):
        attach(_file(tmp_path, random(8, 6)), tmp_path / "out")
