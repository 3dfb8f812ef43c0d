"""Every form in which an exporter writes a linear module gets a branch that computes y + (x · A) · B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper
from safetensors.numpy import save_file

from onnx_lora import Package
from onnx_lora.exporter import attach
from tests.support.graphs import lora, random, save
from tests.support.numbers import assert_close, assert_same_bits

node = helper.make_node
X3 = {"x": ["batch", "seq", 8]}


def _session(package: Package, *, base: bool = False) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = package.graph()
    return ort.InferenceSession(str(package.path / (graph.base_file if base else graph.file)), options)


def _check(package: Package, module: str, x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> None:
    """Base untouched at rank 0; with an adapter, x · (W + A · B); with rows, each row its own."""
    session = _session(package)
    base = session.run(None, {"x": x})[0]
    assert_same_bits(base, _session(package, base=True).run(None, {"x": x})[0])
    one = lora(module, *weight.shape)
    a, b = one.values()
    assert_close(session.run(None, {"x": x, **one})[0], base + (x @ (a[0] @ b[0])))
    point = package.points[module]
    assert point.per_row
    rows = lora(module, *weight.shape, rows=len(x), seed=9)
    each = [base[i] + x[i] @ (a[i] @ b[i]) for i in range(len(x)) for a, b in [tuple(rows.values())]]
    assert_close(session.run(None, {"x": x, **rows})[0], np.stack(each))


def test_matmul_with_a_transposed_weight_behind_it(tmp_path: Path) -> None:
    weight = random(6, 8)
    nodes = [node("Transpose", ["w"], ["wt"], perm=[1, 0]), node("MatMul", ["x", "wt"], ["y"], name="/m/q/MatMul")]
    file = save(tmp_path / "m.onnx", nodes, {"w": weight}, inputs=X3, outputs={"y": ["batch", "seq", 6]})
    package = attach(file, tmp_path / "out")
    _check(package, "m.q", random(3, 5, 8), weight.T)
    assert package.points["m.q"].parts[0].transposed


def test_gemm_of_a_pooled_value_keeps_its_bias(tmp_path: Path) -> None:
    nodes = [node("Gemm", ["x", "m.q.weight", "b"], ["y"], name="/m/q/Gemm", transB=1)]
    weights = {"m.q.weight": random(6, 8), "b": random(6)}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs={"x": ["batch", 8]}, outputs={"y": ["batch", 6]})
    _check(attach(file, tmp_path / "out"), "m.q", random(3, 8), weights["m.q.weight"].T)


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_conv1d_of_gpt2_between_two_reshapes(tmp_path: Path, opset: int) -> None:
    nodes = [
        node("Reshape", ["x", "flat"], ["x2"]),
        node("Gemm", ["x2", "h.0.c_attn.weight", "b"], ["y2"], name="/h.0/c_attn/Gemm"),
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "zero", "two"], ["lead"]),
        node("Concat", ["lead", "last"], ["shape"], axis=0),
        node("Reshape", ["y2", "shape"], ["y"]),
    ]
    weights = {
        "flat": np.array([-1, 8]),
        "zero": np.array([0]),
        "two": np.array([2]),
        "last": np.array([6]),
        "h.0.c_attn.weight": random(8, 6),
        "b": random(6),
    }
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 6]}, opset=opset)
    package = attach(file, tmp_path / "out")
    _check(package, "h.0.c_attn", random(3, 5, 8), weights["h.0.c_attn.weight"])
    assert package.points["h.0.c_attn"].sha256 != ""


def test_two_flat_layers_between_one_pair_of_reshapes(tmp_path: Path) -> None:
    """OPT: fc2 reads rows that fc1 made of rows; the batch is found through them."""
    nodes = [
        node("Reshape", ["x", "flat"], ["x2"]),
        node("MatMul", ["x2", "w1"], ["h"], name="/fc1/MatMul"),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w2"], ["z"], name="/fc2/MatMul"),
        node("Shape", ["x"], ["s"]),
        node("Reshape", ["z", "s"], ["y"]),
    ]
    weights = {"flat": np.array([-1, 8]), "w1": random(8, 4), "w2": random(4, 8)}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    package = attach(file, tmp_path / "out")
    x = random(3, 5, 8)
    rows = lora("fc1", 8, 4, rows=3) | lora("fc2", 4, 8, rows=3, seed=20)
    a1, b1, a2, b2 = rows.values()
    hidden = np.maximum(x @ weights["w1"] + (x @ a1) @ b1, 0)
    assert_close(_session(package).run(None, {"x": x, **rows})[0], hidden @ weights["w2"] + (hidden @ a2) @ b2)


def test_an_input_with_four_axes(tmp_path: Path) -> None:
    """MatMul would meet rows with the second axis; the branch meets them with the batch."""
    nodes = [node("MatMul", ["x", "w"], ["y"], name="/m/q/MatMul")]
    weight = random(8, 6)
    shape = {"x": ["batch", "height", "width", 8]}
    file = save(tmp_path / "m.onnx", nodes, {"w": weight}, inputs=shape, outputs={"y": ["batch", "height", "width", 6]})
    _check(attach(file, tmp_path / "out"), "m.q", random(3, 3, 2, 8), weight)


def test_a_module_used_twice_is_one_point(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="/m/q/MatMul"),
        node("Identity", ["w"], ["w_again"]),
        node("MatMul", ["h", "w_again"], ["y"], name="/m/q_1/MatMul"),
    ]
    weight = random(8, 8)
    file = save(tmp_path / "m.onnx", nodes, {"w": weight}, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    package = attach(file, tmp_path / "out")
    assert list(package.points) == ["m.q"]
    one = lora("m.q", 8, 8)
    a, b = one.values()
    whole = weight + a[0] @ b[0]
    x = random(2, 3, 8)
    assert_close(_session(package).run(None, {"x": x, **one})[0], x @ whole @ whole)


def test_modules_called_q_and_q_1_stay_two(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="/m/q/MatMul"),
        node("MatMul", ["h", "v"], ["y"], name="/m/q_1/MatMul"),
    ]
    weights = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    assert set(attach(file, tmp_path / "out").points) == {"m.q", "m.q_1"}


def _packed(tmp_path: Path) -> tuple[Path, Path, dict[str, np.ndarray[Any, Any]]]:
    modules = {f"layer.{name}_proj": random(size, 8, seed=size) for name, size in (("q", 6), ("k", 4), ("v", 3))}
    packed = np.concatenate(list(modules.values())).T.copy()
    nodes = [node("MatMul", ["x", "packed"], ["y"], name="/layer/attn/qkv_proj/MatMul")]
    file = save(tmp_path / "in" / "m.onnx", nodes, {"packed": packed}, inputs=X3, outputs={"y": ["batch", "seq", 13]})
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file({f"{name}.weight": value for name, value in modules.items()}, checkpoint / "model.safetensors")
    return file, checkpoint, modules


def test_a_packed_projection_has_a_point_per_module(tmp_path: Path) -> None:
    file, checkpoint, modules = _packed(tmp_path)
    package = attach(file, tmp_path / "out", checkpoint=checkpoint, targets=["q_proj", "v_proj"])
    assert [(p.module, p.out_features, p.parts[0].start) for p in package.points.values()] == [
        ("layer.q_proj", 6, 0),
        ("layer.k_proj", 4, 6),
        ("layer.v_proj", 3, 10),
    ]
    x = random(2, 5, 8)
    feeds = lora("layer.q_proj", 8, 6) | lora("layer.v_proj", 8, 3, rank=4)
    expected = [x @ modules["layer.q_proj"].T, x @ modules["layer.k_proj"].T, x @ modules["layer.v_proj"].T]
    for index, name in ((0, "layer.q_proj"), (2, "layer.v_proj")):
        expected[index] = expected[index] + x @ (feeds[f"{name}.lora_A.weight"][0] @ feeds[f"{name}.lora_B.weight"][0])
    inputs = package.graph().inputs(feeds)
    assert inputs.keys() == {f"layer.q_proj+k_proj+v_proj.lora_{factor}.weight" for factor in "AB"}
    assert_close(_session(package).run(None, {"x": x, **inputs})[0], np.concatenate(expected, axis=-1))


def test_a_checkpoint_of_another_base_places_nothing(tmp_path: Path) -> None:
    from onnx_lora.errors import ModelError

    file, checkpoint, modules = _packed(tmp_path)
    save_file({f"{name}.weight": value + 1 for name, value in modules.items()}, checkpoint / "model.safetensors")
    with pytest.raises(ModelError, match="no weight of the checkpoint equals its weight"):
        attach(file, tmp_path / "out", checkpoint=checkpoint)
    assert not (tmp_path / "out").exists()


def test_a_head_tied_to_the_embeddings_gets_a_weight_of_its_own(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["embed_tokens.weight", "ids"], ["e"]),
        node("MatMul", ["e", "w"], ["h"], name="/q/MatMul"),
        node("Transpose", ["embed_tokens.weight"], ["t"], perm=[1, 0]),
        node("MatMul", ["h", "t"], ["y"], name="/lm_head/MatMul"),
    ]
    weights = {"embed_tokens.weight": random(20, 8), "w": random(8, 8)}
    shapes: dict[str, Any] = {"inputs": {"ids": ["batch", "seq"]}, "outputs": {"y": ["batch", "seq", 20]}}
    package = attach(save(tmp_path / "m.onnx", nodes, weights, **shapes), tmp_path / "out", targets=["q", "lm_head"])
    part = package.points["lm_head"].parts[0]
    assert part.initializer == "lm_head.weight"
    assert np.array_equal(package.read(part.stored), weights["embed_tokens.weight"])
    assert (package.path / "model.onnx.data").stat().st_size < 2 * weights["embed_tokens.weight"].nbytes
    ids = np.array([[1, 2, 3]])
    one = lora("lm_head", 8, 20)
    a, b = one.values()
    embedded = weights["embed_tokens.weight"]
    hidden = embedded[ids] @ weights["w"]
    expected = hidden @ (embedded.T + a[0] @ b[0])
    assert_close(_session(package).run(None, {"ids": ids, **one})[0], expected)


def test_default_rank_one_is_a_zero_column(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"], name="/m/q/MatMul")]
    file = save(tmp_path / "m.onnx", nodes, {"w": random(8, 6)}, inputs=X3, outputs={"y": ["batch", "seq", 6]})
    package = attach(file, tmp_path / "out", default_rank=1)
    session = _session(package)
    x = random(2, 3, 8)
    assert_same_bits(session.run(None, {"x": x})[0], _session(package, base=True).run(None, {"x": x})[0])
    assert {arg.name: arg.shape for arg in session.get_overridable_initializers()}["m.q.lora_A.weight"][1] == 8


def test_a_weight_dequantized_by_a_number_that_is_fed_is_listed(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMean", ["x"], ["scale"], keepdims=0),
        node("DequantizeLinear", ["codes", "scale"], ["w"]),
        node("MatMul", ["x", "w"], ["h"], name="/m/q/MatMul"),
        node("MatMul", ["h", "v"], ["y"], name="/m/p/MatMul"),
    ]
    weights = {"codes": np.ones((8, 6), np.int8), "v": random(6, 4)}
    package = attach(
        save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 4]}), tmp_path / "out"
    )
    assert list(package.points) == ["m.p"]
    assert [(entry.node, "not constant" in entry.reason) for entry in package.graph().unplaced] == [
        ("/m/q/MatMul", True)
    ]


def test_what_has_no_place_is_listed_with_its_reason(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="/m/q/MatMul"),
        node("MatMul", ["left", "h"], ["g"], name="/m/left/MatMul"),
        node("Gemm", ["flat", "w"], ["unused"], name="/m/scaled/Gemm", alpha=0.5),
        node("Add", ["g", "unused"], ["y"]),
    ]
    weights = {"w": random(8, 6), "left": random(5, 5), "flat": random(5, 8)}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs={"x": ["batch", 5, 8]}, outputs={"y": ["batch", 5, 6]})
    reasons = {entry.node: entry.reason for entry in attach(file, tmp_path / "out").graph().unplaced}
    assert reasons == {
        "/m/left/MatMul": "the weight is the left factor",
        "/m/scaled/Gemm": "a Gemm with transA or alpha is no linear module",
    }
