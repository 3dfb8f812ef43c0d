"""Points on quantized weights: made by ONNX Runtime's own quantizers, the delta exact beside each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node as node
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from safetensors.numpy import save_file

from onnx_lora import AdapterSession, Package, bind, fold
from onnx_lora.adapters import Adapter, Delta, Origin
from onnx_lora.errors import ModelError
from onnx_lora.exporter import attach
from onnx_lora.points import Array
from onnx_lora.quantized import Scheme, dequantize, quantize
from tests.support.cpu import saturates_in_int8
from tests.support.graphs import random, save
from tests.support.numbers import assert_close

WIDTH, OUTPUTS = 40, 24  # 40 is no multiple of the block: the last one is padded
X = {"x": ["batch", "seq", WIDTH]}


def _float(folder: Path, *, gemm: bool = False) -> Path:
    """y = x · q · o, as an exporter names it."""
    nodes = [
        node("MatMul", ["x", "m.q.weight_t"], ["h"], name="/m/q/MatMul"),
        node("MatMul", ["h", "m.o.weight_t"], ["y"], name="/m/o/MatMul"),
    ]
    weights = {"m.q.weight_t": random(WIDTH, OUTPUTS), "m.o.weight_t": random(OUTPUTS, 8, seed=3)}
    return save(folder / "float.onnx", nodes, weights, inputs=X, outputs={"y": ["batch", "seq", 8]}, opset=21)


def _checkpoint(folder: Path) -> Path:
    folder.mkdir()
    weights = {"m.q.weight": random(WIDTH, OUTPUTS).T, "m.o.weight": random(OUTPUTS, 8, seed=3).T}
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, folder / "model.safetensors")
    return folder


def _nbits(bits: int, symmetric: bool, format: QuantFormat = QuantFormat.QOperator) -> Callable[[Path, Path], None]:
    def quantize_file(source: Path, out: Path) -> None:
        config = DefaultWeightOnlyQuantConfig(block_size=16, is_symmetric=symmetric, bits=bits, quant_format=format)
        quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
        quantizer.process()
        onnx.save(quantizer.model.model, out)

    return quantize_file


def _dynamic(kind: QuantType, per_channel: bool) -> Callable[[Path, Path], None]:
    def quantize_file(source: Path, out: Path) -> None:
        quantize_dynamic(source, out, weight_type=kind, per_channel=per_channel)

    return quantize_file


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._left = [{"x": random(1, 3, WIDTH, seed=seed)} for seed in range(3)]

    def get_next(self) -> dict[str, Array] | None:
        return self._left.pop() if self._left else None


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "4 bits": _nbits(4, symmetric=True),
    "4 bits with zero points": _nbits(4, symmetric=False),
    "8 bits": _nbits(8, symmetric=True),
    "8 bits with zero points": _nbits(8, symmetric=False),
    "4 bits, DequantizeLinear in blocks": _nbits(4, symmetric=True, format=QuantFormat.QDQ),
    "4 bits with zero points, DequantizeLinear in blocks": _nbits(4, symmetric=False, format=QuantFormat.QDQ),
    "dynamic int8": _dynamic(QuantType.QInt8, per_channel=False),
    "dynamic uint8": _dynamic(QuantType.QUInt8, per_channel=False),
    "dynamic int8 per channel": _dynamic(QuantType.QInt8, per_channel=True),
}


@pytest.fixture(params=FORMS)
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "in" / "model.onnx"
    file.parent.mkdir()
    FORMS[request.param](_float(tmp_path), file)
    return file


def _delta(inputs: int, outputs: int, *, rank: int = 3, seed: int = 7) -> Delta:
    return Delta(random(rank, inputs, seed=seed), random(outputs, rank, seed=seed + 1), 0.5)


def _adapter(**deltas: Delta) -> Adapter:
    return Adapter("it", {f"m.{name}": delta for name, delta in deltas.items()}, {}, Origin("memory", "", "", "", ""))


def _change(delta: Delta) -> Array:
    """What the delta adds, `[in, out]` in float64."""
    wide = delta.b.astype(np.float64) @ delta.a.astype(np.float64) * delta.scale
    return np.asarray(wide.T)


@pytest.mark.parametrize("by_weights", [False, True], ids=["by name", "by the checkpoint"])
def test_the_delta_is_exact_beside_a_quantized_weight(quantized: Path, tmp_path: Path, by_weights: bool) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint") if by_weights else None
    package = attach(quantized, tmp_path / "out", checkpoint=checkpoint)
    assert list(package.points) == ["m.q", "m.o"]
    assert all(point.per_row for point in package.points.values())
    session, x, delta = AdapterSession(package), random(3, 5, WIDTH), _delta(OUTPUTS, 8)
    # By name, a scale of its inputs may have been moved into the layer before: that is for the caller to know.
    assert bool(package.unproven) != by_weights
    session.load_adapter("last", _adapter(o=delta), allow_unproven=not by_weights)
    base = session.run(["y"], {"x": x})[0]
    # What the last product is given, from the quantized base itself.
    hidden = _value(quantized, package, "h", x)
    change = session.run(["y"], {"x": x}, adapter="last")[0] - base
    assert_close(change, (hidden.astype(np.float64) @ _change(delta)).astype(np.float32))
    rows = session.run(["y"], {"x": x}, adapter=["last", None, {"last": 0.5}])[0] - base
    expected = hidden.astype(np.float64) @ _change(delta) * np.array([1.0, 0.0, 0.5])[:, None, None]
    assert_close(rows, expected.astype(np.float32))


def _value(file: Path, package: Package, name: str, x: Array) -> Array:
    """A float inside the quantized graph: the first product before anything quantizes it again."""
    model = onnx.load(package.path / package.graph().base_file)
    producers = {output: entry for entry in model.graph.node for output in entry.output}
    last = next(entry for entry in reversed(model.graph.node) if "/m/o/" in entry.name and "MatMul" in entry.op_type)
    source = last.input[0]
    while (maker := producers.get(source)) is not None and "Quantize" in maker.op_type.replace(
        "Dequantize", "Quantize"
    ):
        source = maker.input[0]
    model.graph.output.append(helper.make_tensor_value_info(source, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString(), options).run([source], {"x": x})[0])


def test_a_quantized_weight_reads_as_the_runtime_computes_it(tmp_path: Path, quantized: Path) -> None:
    package = attach(quantized, tmp_path / "out")
    weights = [package.module_weight(package.points[name]) for name in ("m.q", "m.o")]
    for weight, original in zip(weights, (random(WIDTH, OUTPUTS), random(OUTPUTS, 8, seed=3)), strict=True):
        assert np.linalg.norm(weight - original) < 0.15 * np.linalg.norm(original)
    if saturates_in_int8() and _multiplies_int8(quantized):
        pytest.skip("this processor has no VNNI: ONNX Runtime's own sums of int8 saturate")
    session, x = AdapterSession(package), random(2, 3, WIDTH)
    answer, exact = session.run(["y"], {"x": x})[0], x @ weights[0] @ weights[1]
    # Dynamic and static forms round activations to 8 bits too.
    assert np.linalg.norm(answer - exact) < 0.03 * np.linalg.norm(exact)


def _multiplies_int8(file: Path) -> bool:
    """Whether a graph multiplies activations in uint8 with weights in int8."""
    graph = onnx.load(file).graph
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    return any(entry.op_type == "MatMulInteger" and entry.input[1] in weights for entry in graph.node)


def test_a_packed_quantized_projection_has_a_point_per_module(tmp_path: Path) -> None:
    query, key = random(WIDTH, 16, seed=1), random(WIDTH, 8, seed=2)
    nodes = [node("MatMul", ["x", "w"], ["y"], name="/m/qk/MatMul")]
    source = save(
        tmp_path / "f.onnx", nodes, {"w": np.concatenate([query, key], axis=1)}, inputs=X,
        outputs={"y": ["batch", "seq", 24]}, opset=21,
    )  # fmt: skip
    file = tmp_path / "in" / "model.onnx"
    file.parent.mkdir()
    _nbits(4, symmetric=True)(source, file)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    weights = {"m.q.weight": np.ascontiguousarray(query.T), "m.k.weight": np.ascontiguousarray(key.T)}
    save_file(weights, checkpoint / "model.safetensors")
    package = attach(file, tmp_path / "out", checkpoint=checkpoint)
    assert [(point.module, point.out_features) for point in package.points.values()] == [("m.q", 16), ("m.k", 8)]
    session, x, delta = AdapterSession(package), random(2, 3, WIDTH), _delta(WIDTH, 8)
    session.load_adapter("k", _adapter(k=delta))
    change = session.run(None, {"x": x}, adapter="k")[0] - session.run(None, {"x": x})[0]
    assert_close(change[..., 16:], (x.astype(np.float64) @ _change(delta)).astype(np.float32))
    assert not change[..., :16].any()


def test_a_weight_cut_into_several_nodes_is_one_module(tmp_path: Path) -> None:
    both = random(WIDTH, 24, seed=1)
    nodes = [
        node("MatMul", ["x", "gate"], ["g"], name="/m/gate_proj/MatMul"),
        node("Sigmoid", ["g"], ["s"]),
        node("MatMul", ["x", "up"], ["u"], name="/m/up_proj/MatMul"),
        node("Mul", ["s", "u"], ["y"]),
    ]
    weights = {"gate": both[:, :12].copy(), "up": both[:, 12:].copy()}
    file = save(tmp_path / "in" / "m.onnx", nodes, weights, inputs=X, outputs={"y": ["batch", "seq", 12]})
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file({"m.gate_up_proj.weight": np.ascontiguousarray(both.T)}, checkpoint / "model.safetensors")
    package = attach(file, tmp_path / "out", checkpoint=checkpoint)
    assert [(point.module, point.out_features) for point in package.points.values()] == [("m.gate_up_proj", 24)]
    assert_close(package.module_weight(package.points["m.gate_up_proj"]), both)
    session, x, delta = AdapterSession(package), random(2, 3, WIDTH) * 0.1, _delta(WIDTH, 24)
    bound = bind(_adapter(gate_up_proj=delta), package)
    session.load_adapter("it", bound)
    whole = (x.astype(np.float64) @ (both + _change(delta))).astype(np.float32)
    expected = whole[..., 12:] / (1 + np.exp(-whole[..., :12]))
    assert_close(session.run(None, {"x": x}, adapter="it")[0], expected)
    assert_close(fold(package, bound).run(None, {"x": x})[0], expected)


def test_a_piece_whose_other_half_is_missing_gets_no_point(tmp_path: Path) -> None:
    both = random(WIDTH, 24, seed=1)
    nodes = [node("MatMul", ["x", "gate"], ["h"], name="/m/gate_proj/MatMul"), node("MatMul", ["h", "v"], ["y"])]
    weights = {"gate": both[:, :12].copy(), "v": random(12, 4)}
    file = save(tmp_path / "in" / "m.onnx", nodes, weights, inputs=X, outputs={"y": ["batch", "seq", 4]})
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    named = {"m.gate_up_proj.weight": np.ascontiguousarray(both.T), "m.o.weight": np.ascontiguousarray(weights["v"].T)}
    save_file(named, checkpoint / "model.safetensors")
    package = attach(file, tmp_path / "out", checkpoint=checkpoint)
    assert list(package.points) == ["m.o"]
    assert "others are not computed" in package.graph().unplaced[0].reason


def test_a_quantized_weight_of_another_base_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "in" / "model.onnx"
    file.parent.mkdir()
    _nbits(4, symmetric=True)(_float(tmp_path), file)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    other = {"m.q.weight": random(OUTPUTS, WIDTH, seed=9), "m.o.weight": random(OUTPUTS, 8, seed=3).T.copy()}
    save_file(other, checkpoint / "model.safetensors")
    package = attach(file, tmp_path / "out", checkpoint=checkpoint)
    assert list(package.points) == ["m.o"]
    assert "not the checkpoint's m.q.weight" in package.graph().unplaced[0].reason


def test_a_quantized_package_has_the_digests_of_its_float_source(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint")
    file = tmp_path / "in" / "model.onnx"
    file.parent.mkdir()
    _nbits(4, symmetric=True)(_float(tmp_path), file)
    quantized_package = attach(file, tmp_path / "int4", checkpoint=checkpoint)
    float_package = attach(tmp_path / "float.onnx", tmp_path / "fp32", checkpoint=checkpoint)
    assert quantized_package.fingerprint == float_package.fingerprint


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_are_quantized_as_the_runtime_does(bits: int, symmetric: bool) -> None:
    from onnxruntime.capi import _pybind_state

    weight = random(WIDTH, OUTPUTS)
    blocks = -(-WIDTH // 16)
    values = np.zeros((OUTPUTS, blocks, 16 * bits // 8), np.uint8)
    scale = np.zeros(OUTPUTS * blocks, np.float32)
    zeros = np.zeros((OUTPUTS, -(-blocks * bits // 8)), np.uint8)
    run = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    run(values, weight, scale, zeros.reshape(-1), 16, OUTPUTS, WIDTH, symmetric)
    scheme = Scheme("blocks", bits, 16, -1, OUTPUTS, WIDTH)
    own = quantize(scheme, np.ascontiguousarray(weight.T), values, None if symmetric else zeros)
    theirs = dequantize(scheme, values, scale, None if symmetric else zeros)
    # A tie may round the other way: one step of one number, in a few.
    steps = np.abs(dequantize(scheme, *own) - theirs)
    assert np.quantile(steps, 0.98) < 1e-5
    assert np.linalg.norm(dequantize(scheme, *own) - weight.T) <= 1.02 * np.linalg.norm(theirs - weight.T)


@pytest.mark.parametrize("scheme", [
    Scheme("affine", 8, 0, -1, 6, 8),
    Scheme("affine", 8, 0, 1, 6, 8),
    Scheme("affine", 8, 0, 0, 6, 8),
    Scheme("affine", 4, 4, 0, 6, 8),
    Scheme("blocks", 2, 16, -1, 6, 8),
])  # fmt: skip
@pytest.mark.parametrize("zeros", [False, True])
def test_quantizing_loses_at_most_half_a_step(scheme: Scheme, zeros: bool) -> None:
    weight = random(6, 8) + np.float32(0.3)
    kind = np.uint8 if zeros or scheme.layout == "blocks" else np.int8
    like = (
        np.full((6, 8), 255 if scheme.bits == 8 else 15, np.uint8)
        if zeros
        else np.full((6, 8), -100 if scheme.bits == 8 else -7, np.int8)
    )
    shapes = {-1: (), 0: (6,), 1: (8,)}
    count = (2, 8) if scheme.block_size and scheme.layout == "affine" else shapes[scheme.axis]
    point = np.ones((6, 1) if scheme.layout == "blocks" else count, np.uint8) if zeros else None
    values, scale, zero = quantize(scheme, weight, like.astype(kind), point)
    again = dequantize(scheme, values, scale, zero)
    step = np.abs(scale).max()
    assert np.abs(again - weight).max() <= step * (1.01 if scheme.layout == "blocks" else 0.51)


def test_activations_with_fixed_ranges_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "in" / "model.onnx"
    file.parent.mkdir()
    quantize_static(_float(tmp_path), file, _Samples(), quant_format=QuantFormat.QDQ, per_channel=True)
    with pytest.raises(ModelError, match="fixed without adapters"):
        attach(file, tmp_path / "out")


def test_the_order_of_inputs_is_refused_by_name(tmp_path: Path) -> None:
    values = np.zeros((8, 2, 8), np.uint8)
    nodes = [
        node("MatMulNBits", ["x", "b", "s", "", "order"], ["y"], domain="com.microsoft", name="/m/q/MatMul_Q4",
             K=32, N=8, bits=4, block_size=16),
    ]  # fmt: skip
    weights = {"b": values, "s": np.ones(16, np.float32), "order": np.arange(32, dtype=np.int32)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, ["batch", "seq", 32])],
        [helper.make_tensor_value_info("y", 1, ["batch", "seq", 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="another order"):
        attach(tmp_path / "m.onnx", tmp_path / "out")


def _genai_folder(folder: Path, architecture: str = "llama", heads: int = 2) -> Path:
    """What the GenAI builder writes of one attention: q, k and v packed in 4 bits, and its config."""
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="/model/layers.0/attn/qkv_proj/MatMul"),
        node("MatMul", ["h", "v"], ["y"], name="/model/layers.0/mlp/down_proj/MatMul"),
    ]
    weights, outputs = {"w": random(WIDTH, 32), "v": random(32, 8)}, {"y": ["batch", "seq", 8]}
    source = save(folder.parent / "f.onnx", nodes, weights, inputs=X, outputs=outputs, opset=21)
    folder.mkdir()
    _nbits(4, symmetric=True)(source, folder / "model.onnx")
    decoder = {"head_size": 8, "num_attention_heads": heads, "num_key_value_heads": 1}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"type": architecture, "decoder": decoder}}))
    return folder


def test_a_genai_folder_without_its_checkpoint_gets_peft_names(tmp_path: Path) -> None:
    package = attach(_genai_folder(tmp_path / "in"), tmp_path / "out")
    attention = "model.layers.0.self_attn"
    names = [f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj", "model.layers.0.mlp.down_proj"]
    assert list(package.points) == names
    assert [point.out_features for point in package.points.values()] == [16, 8, 8, 8]
    assert package.graph().branches[0].name == f"{attention}.q_proj+k_proj+v_proj"
    assert (tmp_path / "out" / "genai_config.json").is_file()


@pytest.mark.parametrize(
    "folder, reason", [({"architecture": "phi3"}, "give the checkpoint"), ({"heads": 3}, "outputs")]
)
def test_a_genai_folder_whose_names_do_not_tell_is_refused(tmp_path: Path, folder: dict[str, Any], reason: str) -> None:
    made = _genai_folder(tmp_path / "in", **folder)
    if "heads" in folder:
        assert reason in attach(made, tmp_path / "out").graph().unplaced[0].reason
    else:
        with pytest.raises(ModelError, match=reason):
            attach(made, tmp_path / "out")


@pytest.mark.parametrize("config", ['{"model": 3}', '{"model": {"decoder": {"head_size": 1e999}}}'])
def test_a_damaged_genai_config_is_refused(config: str, tmp_path: Path) -> None:
    made = _genai_folder(tmp_path / "in")
    (made / "genai_config.json").write_text(config)
    with pytest.raises(ModelError, match="GenAI's config"):
        attach(made, tmp_path / "out")
