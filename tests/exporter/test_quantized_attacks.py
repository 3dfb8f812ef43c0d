"""Quantized graphs and manifests that went wrong once, or could: shared scales, cut modules, hostile schemes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx.helper import make_node as node
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import save_file

from onnx_lora import AdapterSession, Package, bind, fold
from onnx_lora.adapters import Adapter, Delta, Origin
from onnx_lora.errors import BindError, ModelError, PackageError
from onnx_lora.exporter import attach
from onnx_lora.exporter.quantization import Method, quantize
from onnx_lora.points import Array
from onnx_lora.runtime import Requantize
from tests.support.graphs import random, save

X16 = {"x": ["batch", "seq", 16]}


def _delta(inputs: int, outputs: int) -> Delta:
    return Delta(random(3, inputs, seed=7), random(outputs, 3, seed=8), 1.0)


def _adapter(**deltas: Delta) -> Adapter:
    return Adapter("it", {f"m.{name}": delta for name, delta in deltas.items()}, {}, Origin("memory", "", "", "", ""))


def _folds(package: Package, adapter: Adapter, feeds: dict[str, Array], within: float = 0.05) -> None:
    """Folded, the package answers what it does with the adapter beside it, but for rounding."""
    bound, session = bind(adapter, package, allow_unproven=True), AdapterSession(package)
    session.load_adapter("it", bound, allow_unproven=True)
    wanted = session.run(None, feeds, adapter="it")[0]
    got = fold(package, bound, requantize=Requantize(), allow_unproven=True).run(None, feeds)[0]
    assert np.abs(got - wanted).max() < within * np.abs(wanted).max()


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_a_dynamic_module_called_twice_is_folded_in_both(tmp_path: Path, kind: QuantType) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="/m/q/MatMul"),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w"], ["y"], name="/m/q_1/MatMul"),
    ]
    source = save(tmp_path / "f.onnx", nodes, {"w": random(16, 16)}, inputs=X16, outputs={"y": X16["x"]}, opset=21)
    (tmp_path / "in").mkdir()
    quantize_dynamic(source, tmp_path / "in" / "m.onnx", weight_type=kind)
    package = attach(tmp_path / "in" / "m.onnx", tmp_path / "out")
    assert list(package.points) == ["m.q"]
    _folds(package, _adapter(q=_delta(16, 16)), {"x": random(2, 3, 16)})


@pytest.mark.parametrize("order", [["gate", "up"], ["up", "gate"]])
def test_pieces_that_share_a_zero_point_are_folded_apart(tmp_path: Path, order: list[str]) -> None:
    both = random(40, 24, seed=1)
    both[:, :12] += 1
    pieces, weights = {"gate": both[:, :12], "up": both[:, 12:]}, {"zp": np.asarray(np.uint8(100))}
    nodes = []
    for name in order:
        scale = np.float32(np.abs(pieces[name]).max() / 100)
        weights[name] = (np.rint(pieces[name] / scale) + 100).clip(0, 255).astype(np.uint8)
        weights[f"{name}_s"] = np.asarray(scale)
        nodes.append(node("DequantizeLinear", [name, f"{name}_s", "zp"], [f"{name}_w"]))
        nodes.append(node("MatMul", ["x", f"{name}_w"], [f"{name}_y"], name=f"/m/{name}_proj/MatMul"))
        nodes.append(node("Sigmoid", [f"{name}_y"], [f"{name}_o"]))
    nodes.append(node("Concat", ["gate_o", "up_o"], ["y"], axis=-1))
    shapes: dict[str, Any] = {"inputs": {"x": ["batch", "seq", 40]}, "outputs": {"y": ["batch", "seq", 24]}}
    file = save(tmp_path / "in" / "m.onnx", nodes, weights, opset=21, **shapes)
    (tmp_path / "c").mkdir()
    save_file({"m.gate_up_proj.weight": np.ascontiguousarray(both.T)}, tmp_path / "c" / "model.safetensors")
    package = attach(file, tmp_path / "out", checkpoint=tmp_path / "c")
    assert list(package.points) == ["m.gate_up_proj"]
    _folds(package, _adapter(gate_up_proj=_delta(40, 24)), {"x": random(2, 3, 40) * np.float32(0.1)})


def test_one_initializer_at_two_scales_is_two_modules(tmp_path: Path) -> None:
    weight = random(16, 16)
    scale = np.asarray(np.float32(np.abs(weight).max() / 127))
    nodes = [
        node("DequantizeLinear", ["w", "s1"], ["a"]),
        node("DequantizeLinear", ["w", "s2"], ["b"]),
        node("MatMul", ["x", "a"], ["h"], name="/m/fc/MatMul"),
        node("MatMul", ["h", "b"], ["y"], name="/m/fc_1/MatMul"),
    ]
    weights = {"w": np.rint(weight / scale).astype(np.int8), "s1": scale, "s2": np.asarray(scale * 2)}
    file = save(tmp_path / "in" / "m.onnx", nodes, weights, inputs=X16, outputs={"y": X16["x"]}, opset=21)
    package = attach(file, tmp_path / "out")
    assert list(package.points) == ["m.fc", "m.fc_1"]
    _folds(package, _adapter(fc=_delta(16, 16)), {"x": random(2, 3, 16)})


def test_a_gemm_weight_that_others_read_is_quantized_once(tmp_path: Path) -> None:
    nodes = [
        node("Gemm", ["x", "m.q.weight"], ["h"], name="/m/q/Gemm", transB=1),
        node("Gemm", ["h", "m.e.weight"], ["g"], name="/m/e/Gemm", transB=1),
        node("Relu", ["g"], ["r"]),
        node("Gemm", ["r", "m.e.weight"], ["y"], name="/m/e_1/Gemm", transB=1),
    ]
    weights = {"m.q.weight": random(32, 32), "m.e.weight": random(32, 32, seed=4)}
    shapes: dict[str, Any] = {"inputs": {"x": ["batch", 32]}, "outputs": {"y": ["batch", 32]}}
    package = attach(
        save(tmp_path / "in" / "f.onnx", nodes, weights, opset=21, **shapes), tmp_path / "f", targets=["q"]
    )
    quantized = quantize(package, tmp_path / "q", method=Method(bits=8, accuracy_level=0))
    x = random(4, 32)
    wanted, got = (AdapterSession(each).run(None, {"x": x})[0] for each in (package, quantized))
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


def _one(folder: Path, kind: str) -> Package:
    source = save(
        folder / "f" / "m.onnx",
        [node("MatMul", ["x", "w"], ["y"], name="/m/q/MatMul")],
        {"w": random(40, 24)},
        inputs={"x": ["batch", "seq", 40]},
        outputs={"y": ["batch", "seq", 24]},
        opset=21,
    )
    method = Method("dynamic", 8) if kind == "affine" else Method(bits=4, block_size=16)
    return quantize(attach(source, folder / "float"), folder / kind, method=method)


def _scheme(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda point: point["parts"][0]["quantized"]["scheme"].update(changes)


def _part(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda point: point["parts"][0].update(changes)


HOSTILE = {
    **{f"block_size {size}": _scheme(block_size=size) for size in (-16, 2**40)},
    **{f"bits {bits}": _scheme(bits=bits) for bits in (-1, 0, 3)},
    **{f"axis {axis}": _scheme(axis=axis) for axis in (-7, 5)},
    "rows": _scheme(rows=3),
    "columns": _scheme(columns=7),
    "negative columns": _scheme(columns=-40),
    "start": _part(start=-3),
    "start beyond": _part(start=5),
    "first": _part(first=9),
    "outputs": _part(outputs=1),
    "no outputs": _part(outputs=-2),
    "no parts": lambda point: point.update(parts=[]),
    "not quantized": _part(quantized=None),
    "quantized twice": lambda point: point["parts"][0].update(quantized=[point["parts"][0]["quantized"]] * 2),
    "scale": lambda point: point["parts"][0]["quantized"]["scale"]["stored"].update(shape=[3]),
    "features": lambda point: point.update(in_features=41),
}


@pytest.mark.parametrize("kind", ["blocks", "affine"])
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, kind: str) -> None:
    package = _one(tmp_path, kind)
    manifest = package.path / "onnx_lora.json"
    good = manifest.read_text()
    opened = []
    for name, change in HOSTILE.items():
        data = json.loads(good)
        change(data["graphs"][0]["points"][0])
        manifest.write_text(json.dumps(data))
        try:
            Package.open(package.path)
        except PackageError:
            continue
        opened.append(name)
    # The axis says nothing of blocks.
    assert opened == (["axis -7", "axis 5"] if kind == "blocks" else [])


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    package = _one(tmp_path, "blocks")
    with pytest.raises(BindError, match="must be a float package"):
        fold(package, bind(_adapter(q=_delta(40, 24)), package), requantize=Requantize(package))


def test_a_checkpoint_of_another_fine_tune_is_refused_at_8_bits(tmp_path: Path) -> None:
    package = _one(tmp_path, "affine")
    (tmp_path / "c").mkdir()
    tuned = random(40, 24) + 0.25 * random(40, 24, seed=9)
    save_file({"m.q.weight": np.ascontiguousarray(tuned.T)}, tmp_path / "c" / "model.safetensors")
    with pytest.raises(ModelError, match="not the checkpoint's"):
        attach(package.path / package.graph().base_file, tmp_path / "out", checkpoint=tmp_path / "c")
