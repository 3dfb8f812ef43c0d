"""A package made by hand, small enough to compute with numpy: every kind of weight a fold can meet.

x · norm.weight, masked -> W_qk (q and k packed) -> tanh -> up (stored transposed) -> mean over seq -> score
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lora.adapters import BoundAdapter
from onnx_lora.adapters.adapter import Coverage, Origin
from onnx_lora.manifest import FORMAT_VERSION, MANIFEST, GraphInfo, Manifest
from onnx_lora.package import Package
from onnx_lora.points import Array, Branch, InjectionPoint, StoredTensor, WeightPart, WholeWeight, digest
from onnx_lora.roles import LinearBias, LinearWeight, Parameter, Role

IN, HALF, HIDDEN, LABELS = 8, 6, 8, 3
MODULES = {"layer.q": (IN, HALF), "layer.k": (IN, HALF), "layer.up": (2 * HALF, HIDDEN)}

# Initializers of the base graph, and the name of each in the data file's order.
_SHAPES = {"W_qk": (IN, 2 * HALF), "W_up": (HIDDEN, 2 * HALF), "W_score": (LABELS, HIDDEN), "b_score": (LABELS,)}
_DATA = "model.onnx.data"

_node, _info = helper.make_node, helper.make_tensor_value_info


def weights(dtype: str = "float32") -> dict[str, Array]:
    """The base's initializers."""
    rng = np.random.default_rng(7)
    values = {name: rng.normal(scale=0.5, size=shape) for name, shape in _SHAPES.items()}
    values["norm"] = rng.normal(loc=1.0, scale=0.1, size=(IN,))
    return {name: value.astype(dtype) for name, value in values.items()}


def make_package(
    folder: Path, *, graphs: Sequence[str] = ("tiny",), dtype: str = "float32", per_row: bool = True
) -> Package:
    """Write the package, with its graph once under every name."""
    folder.mkdir(parents=True)
    values = weights(dtype)
    stored: dict[str, StoredTensor] = {}
    with (folder / _DATA).open("wb") as file:
        for name, value in values.items():
            file.write(bytes(-file.tell() % 64))
            stored[name] = StoredTensor(_DATA, file.tell(), value.shape, dtype)
            file.write(value.tobytes())
    infos = []
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for name in graphs:
        file, base_file = ("model.onnx", "base.onnx") if len(graphs) == 1 else (f"{name}.onnx", f"base.{name}.onnx")
        onnx.save(_point_graph(stored, kind, values), folder / file)
        onnx.save(_base_graph(stored, kind), folder / base_file)
        points = _points(stored, values, per_row)
        branches = tuple(Branch((point.module,)) for point in points)
        infos.append(GraphInfo(name, file, base_file, points, branches, _replaceable(stored, values)))
    manifest = Manifest(FORMAT_VERSION, "by hand", {}, tuple(infos))
    (folder / MANIFEST).write_text(manifest.to_json())
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "a"}, "label2id": {"a": 0}, "dim": IN}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "note.txt").write_text("comes along")
    return Package.open(folder)


def _points(
    stored: Mapping[str, StoredTensor], values: Mapping[str, Array], per_row: bool
) -> tuple[InjectionPoint, ...]:
    parts = {
        "layer.q": WeightPart("W_qk", stored["W_qk"], HALF),
        "layer.k": WeightPart("W_qk", stored["W_qk"], HALF, start=HALF),
        "layer.up": WeightPart("W_up", stored["W_up"], HIDDEN, transposed=True),
    }
    points = []
    for module, part in parts.items():
        width, out = MODULES[module]
        own = digest(part.window(values[part.initializer]).T)
        points.append(InjectionPoint(module, width, out, part.stored.dtype, per_row, own, (part,)))
    return tuple(points)


def _replaceable(stored: Mapping[str, StoredTensor], values: Mapping[str, Array]) -> tuple[WholeWeight, ...]:
    dtype = str(values["norm"].dtype)

    def weight(name: str, role: Role, initializer: str, *, free: bool, transposed: bool = False) -> WholeWeight:
        part = WeightPart(initializer, stored[initializer], stored[initializer].shape[0], transposed)
        value = values[initializer]
        rows = role.has_rows
        return WholeWeight(name, role, value.shape, dtype, free, rows, digest(value), (part,))

    return (
        weight("score.weight", LinearWeight(), "W_score", free=True, transposed=True),
        weight("score.bias", LinearBias(), "b_score", free=True),
        weight("norm.weight", Parameter(), "norm", free=False),
    )


def _external(name: str, place: StoredTensor, kind: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=place.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _base_graph(stored: Mapping[str, StoredTensor], kind: int) -> onnx.ModelProto:
    nodes = [
        *_front(kind, "norm"),
        _node("Tanh", ["qk"], ["t"]),
        *_up(),
        _node("ReduceMean", ["up"], ["pooled"], axes=[1], keepdims=0),
        _node("Gemm", ["pooled", "W_score", "b_score"], ["logits"], transB=1),
    ]
    tensors = [_ints("last", -1), *(_external(name, place, kind) for name, place in stored.items())]
    outputs = [_info("logits", kind, ["batch", LABELS]), _info("up", kind, ["batch", "seq", HIDDEN])]
    between = [_info("pooled", kind, ["batch", HIDDEN])]
    return _model(helper.make_graph(nodes, "base", _inputs(kind), outputs, tensors, value_info=between))


def _point_graph(stored: Mapping[str, StoredTensor], kind: int, values: Mapping[str, Array]) -> onnx.ModelProto:
    nodes = [
        *_front(kind, "norm.weight"),
        *_branch("layer.q", "n"),
        *_branch("layer.k", "n"),
        _node("Concat", ["layer.q.delta", "layer.k.delta"], ["qk_delta"], axis=-1),
        _node("Add", ["qk", "qk_delta"], ["qk_all"]),
        _node("Tanh", ["qk_all"], ["t"]),
        *_up(),
        *_branch("layer.up", "t"),
        _node("Add", ["up", "layer.up.delta"], ["up_all"]),
        _node("ReduceMean", ["up_all"], ["pooled"], axes=[1], keepdims=0),
        _node("Unsqueeze", ["pooled", "one"], ["pooled_3"]),
        _node("MatMul", ["pooled_3", "score.weight"], ["scored"]),
        _node("Add", ["scored", "score.bias"], ["biased"]),
        _node("Squeeze", ["biased", "one"], ["logits"]),
    ]
    inputs, defaults = _optional(kind, values)
    tensors = [_ints("last", -1), _ints("one", 1), *defaults]
    tensors += [_external(name, stored[name], kind) for name in ("W_qk", "W_up")]
    outputs = [_info("logits", kind, ["batch", "outputs"]), _info("up_all", kind, ["batch", "seq", HIDDEN])]
    return _model(helper.make_graph(nodes, "points", [*_inputs(kind), *inputs], outputs, tensors))


def _inputs(kind: int) -> list[onnx.ValueInfoProto]:
    return [_info("x", kind, ["batch", "seq", IN]), _info("mask", TensorProto.INT64, ["batch", "seq"])]


def _front(kind: int, norm: str) -> list[onnx.NodeProto]:
    return [
        _node("Cast", ["mask"], ["mask_f"], to=kind),
        _node("Unsqueeze", ["mask_f", "last"], ["mask_3"]),
        _node("Mul", ["x", "mask_3"], ["masked"]),
        _node("Mul", ["masked", norm], ["n"]),
        _node("MatMul", ["n", "W_qk"], ["qk"]),
    ]


def _up() -> list[onnx.NodeProto]:
    return [_node("Transpose", ["W_up"], ["W_up_t"], perm=[1, 0]), _node("MatMul", ["t", "W_up_t"], ["up"])]


def _branch(module: str, x: str) -> list[onnx.NodeProto]:
    return [
        _node("MatMul", [x, f"{module}.lora_A.weight"], [f"{module}.low"]),
        _node("MatMul", [f"{module}.low", f"{module}.lora_B.weight"], [f"{module}.delta"]),
    ]


def _optional(kind: int, values: Mapping[str, Array]) -> tuple[list[onnx.ValueInfoProto], list[TensorProto]]:
    """The inputs that adapters fill, and their defaults."""
    dtype = values["norm"].dtype
    shapes: dict[str, list[int | str]] = {
        "score.weight": ["score.rows", HIDDEN, "score.outputs"],
        "score.bias": ["score.bias.rows", 1, "score.outputs"],
        "norm.weight": [IN],
    }
    defaults = {
        "score.weight": values["W_score"].T[None],
        "score.bias": values["b_score"][None, None],
        "norm.weight": values["norm"],
    }
    for module, (width, out) in MODULES.items():
        shapes[f"{module}.lora_A.weight"] = [f"{module}.rows", width, f"{module}.rank"]
        shapes[f"{module}.lora_B.weight"] = [f"{module}.rows", f"{module}.rank", out]
        defaults[f"{module}.lora_A.weight"] = np.zeros((1, width, 0), dtype)
        defaults[f"{module}.lora_B.weight"] = np.zeros((1, 0, out), dtype)
    tensors = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in defaults.items()]
    return [_info(name, kind, shape) for name, shape in shapes.items()], tensors


def _ints(name: str, value: int) -> TensorProto:
    return numpy_helper.from_array(np.array([value], np.int64), name)


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def adapter(
    name: str,
    seed: int,
    *,
    rank: int = 2,
    modules: Sequence[str] = tuple(MODULES),
    labels: int = 0,
    norm: bool = False,
    zero_b: bool = False,
    dtype: str = "float32",
) -> BoundAdapter:
    """A bound adapter; `labels`: with a head of its own that has as many outputs."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for module in modules:
        width, out = MODULES[module]
        tensors[f"{module}.lora_A.weight"] = rng.normal(scale=0.5, size=(1, width, rank))
        tensors[f"{module}.lora_B.weight"] = rng.normal(scale=0.5, size=(1, rank, out)) * (not zero_b)
    if labels:
        tensors["score.weight"] = rng.normal(size=(1, HIDDEN, labels))
        tensors["score.bias"] = rng.normal(size=(1, 1, labels))
    if norm:
        tensors["norm.weight"] = rng.normal(loc=1.0, size=(IN,))
    return bound(name, {key: np.ascontiguousarray(value.astype(dtype)) for key, value in tensors.items()})


def bound(name: str, tensors: Mapping[str, Array]) -> BoundAdapter:
    """Tensors as an adapter that was bound."""
    modules = tuple(module for module in MODULES if f"{module}.lora_A.weight" in tensors)
    replaced = tuple(key for key in tensors if "lora" not in key)
    at_base = tuple(module for module in MODULES if module not in modules)
    coverage = Coverage(modules, replaced, at_base, (), {}, ())
    return BoundAdapter(name, tensors, coverage, Origin("", "", "peft", "LoRA", ""), {})


def scaled(adapter: BoundAdapter, factor: float) -> BoundAdapter:
    """The adapter with another strength (deltas only)."""
    tensors = {
        key: value * np.asarray(factor, value.dtype) if "lora_B" in key else value
        for key, value in adapter.tensors.items()
    }
    return replace(adapter, tensors=tensors)


@dataclass(frozen=True)
class Batch:
    x: Array
    mask: Array

    @property
    def feeds(self) -> dict[str, Array]:
        return {"x": self.x, "mask": self.mask}

    def row(self, index: int) -> dict[str, Array]:
        return {name: value[index : index + 1] for name, value in self.feeds.items()}


def batch(rows: int = 2, seq: int = 5, *, seed: int = 3, dtype: str = "float32") -> Batch:
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, seq), np.int64)
    mask[:, -1] = 0
    return Batch(rng.normal(size=(rows, seq, IN)).astype(dtype), mask)


def oracle(data: Batch, *adapters: tuple[BoundAdapter, float], dtype: str = "float32") -> Array:
    """The logits in float64, with the adapters' deltas added to the weights."""
    base = {name: value.astype(np.float64) for name, value in weights(dtype).items()}
    delta = {module: np.zeros(MODULES[module]) for module in MODULES}
    for each, weight in adapters:
        tensors = {name: value.astype(np.float64) for name, value in each.tensors.items()}
        for module in delta:
            if f"{module}.lora_A.weight" in tensors:
                delta[module] += weight * (tensors[f"{module}.lora_A.weight"] @ tensors[f"{module}.lora_B.weight"])[0]
        base["norm"] = tensors.get("norm.weight", base["norm"])
        if "score.weight" in tensors:
            base["W_score"], base["b_score"] = tensors["score.weight"][0].T, tensors["score.bias"][0, 0]
    n = data.x.astype(np.float64) * data.mask[..., None] * base["norm"]
    t = np.tanh(n @ (base["W_qk"] + np.concatenate([delta["layer.q"], delta["layer.k"]], axis=1)))
    pooled = (t @ (base["W_up"].T + delta["layer.up"])).mean(axis=1)
    logits: Array = pooled @ base["W_score"].T + base["b_score"]
    return logits
