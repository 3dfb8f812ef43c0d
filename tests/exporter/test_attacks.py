"""Graphs made to mislead the exporter: each is placed exactly, or left out and listed with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from torch import nn

from onnx_lora import Adapter, AdapterSession, Package, bind, fold
from onnx_lora.adapters import Delta, Origin, Replacement
from onnx_lora.errors import ModelError
from onnx_lora.exporter import attach, export
from tests.support.graphs import random, save
from tests.support.numbers import assert_close, assert_same_bits

Array = np.ndarray[Any, Any]

node = helper.make_node
X2: dict[str, list[int | str]] = {"x": ["batch", 8]}
X3: dict[str, list[int | str]] = {"x": ["batch", "seq", 8]}


def _matmul(x: str, weight: str, y: str, at: str) -> onnx.NodeProto:
    return node("MatMul", [x, weight], [y], name=f"{at}/MatMul")


def _if(then: Sequence[onnx.NodeProto], otherwise: str) -> onnx.NodeProto:
    """`y = t if flag else otherwise`, with `t` from the nodes of the branch."""
    branches = {
        f"{name}_branch": helper.make_graph(
            list(nodes), name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        )
        for name, nodes, output in (("then", then, "t"), ("else", [node("Identity", [otherwise], ["e"])], "e"))
    }
    return node("If", ["flag"], ["y"], **branches)


def _save_special(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Array],
    *,
    outputs: Mapping[str, Sequence[int | str]],
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> Path:
    """As `save`, for what it has no place for: a bool input `flag`, functions, other domains."""
    flag = [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])] if nodes[-1].op_type == "If" else []
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X3["x"]), *flag],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions)), path)
    return path


def _checkpoint(folder: Path, weights: Mapping[str, Array]) -> Path:
    folder.mkdir()
    save_file(
        {f"{module}.weight": np.ascontiguousarray(value) for module, value in weights.items()},
        folder / "model.safetensors",
    )
    return folder


def _attach(file: Path, **options: Any) -> Package:
    package = attach(file, file.with_name("out"), **options)
    _check_inputs(package)
    return package


def _check_inputs(package: Package) -> None:
    """Every graph input that the manifest names is there, and some node uses it."""
    for info in package.manifest.graphs:
        graph = onnx.load(package.path / info.file, load_external_data=False).graph
        named = info.adapter_inputs
        assert named <= {value.name for value in graph.input}
        assert named <= set(_used(graph))


def _used(graph: onnx.GraphProto) -> Iterable[str]:
    for entry in graph.node:
        yield from entry.input
        for attribute in entry.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _used(attribute.g)


def _reason(package: Package, *names: str, graph: str | None = None) -> str:
    """Why the node or module of one of these names got no point."""
    entries = package.graph(graph).unplaced
    reasons = [entry.reason for entry in entries if entry.node in names]
    assert reasons, f"none of {names} is listed, only {entries}"
    assert all(reasons)
    return "; ".join(reasons)


def _delta(inputs: int, outputs: int, *, seed: int = 11) -> Delta:
    return Delta(random(2, inputs, seed=seed), random(outputs, 2, seed=seed + 1), 1.0)


def _product(delta: Delta) -> Array:
    """What the delta adds to a weight `[in, out]`."""
    return np.asarray(np.matmul(delta.a.T, delta.b.T))


def _adapter(deltas: Mapping[str, Delta] | None = None, replaced: Mapping[str, Array] | None = None) -> Adapter:
    values = {name: Replacement(value) for name, value in (replaced or {}).items()}
    return Adapter("it", deltas or {}, values, Origin("memory", "", "peft", "LoRA", ""))


def _outputs(package: Package, adapter: Adapter, feeds: Mapping[str, Array], graph: str | None = None) -> list[Array]:
    """What the package answers with the adapter fed; with the adapter folded in it answers the same."""
    bound = bind(adapter, package)
    session = AdapterSession(package, graph=graph)
    session.load_adapter("it", bound)
    outputs = session.run(None, feeds, adapter="it")
    for folded, fed in zip(fold(package, bound, graph=graph).run(None, feeds), outputs, strict=True):
        assert_close(folded, fed)
    return list(outputs)


def _base(package: Package, feeds: Mapping[str, Array], graph: str | None = None) -> list[Array]:
    """What the base answers; the graph with points answers the same without an adapter."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    info = package.graph(graph)
    base, fed = (
        ort.InferenceSession(str(package.path / name), options).run(None, feeds) for name in (info.base_file, info.file)
    )
    for expected, actual in zip(base, fed, strict=True):
        assert_close(actual, expected)
    return list(base)


# Replaceable weights: what stands beside them stays, and nothing else follows them.


def test_a_head_keeps_a_bias_that_is_a_constant_node(tmp_path: Path) -> None:
    bias, weight = random(3), random(3, 8)
    nodes = [
        node("Constant", [], ["b"], value=numpy_helper.from_array(bias, "value")),
        node("Gemm", ["x", "classifier.weight", "b"], ["y"], name="/classifier/Gemm", transB=1),
    ]
    file = save(tmp_path / "m.onnx", nodes, {"classifier.weight": weight}, inputs=X2, outputs={"y": ["batch", 3]})
    package, x, other = _attach(file), random(2, 8), random(3, 8, seed=3)
    assert_close(_base(package, {"x": x})[0], x @ weight.T + bias)
    # A bias that cannot grow with the weight lets the weight not grow either.
    assert package.replaceable["classifier.weight"].free_outputs == ("classifier.bias" in package.replaceable)
    replaced = _outputs(package, _adapter(replaced={"classifier.weight": other}), {"x": x})[0]
    assert_close(replaced, x @ other.T + bias)


def test_a_head_keeps_what_a_gemm_adds_that_is_computed(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], ["c"]), node("Gemm", ["x", "w", "c"], ["y"], name="/classifier/Gemm")]
    file = save(tmp_path / "m.onnx", nodes, {"w": random(8, 8)}, inputs=X2, outputs={"y": ["batch", 8]})
    package, x, other = _attach(file), random(2, 8), random(8, 8, seed=3)
    assert_close(_base(package, {"x": x})[0], x @ random(8, 8) + np.maximum(x, 0))
    assert [(name, weight.free_outputs) for name, weight in package.replaceable.items()] == [
        ("classifier.weight", False)
    ]
    replaced = _outputs(package, _adapter(replaced={"classifier.weight": other}), {"x": x})[0]
    assert_close(replaced, x @ other.T + np.maximum(x, 0))


@pytest.mark.parametrize("shape", [(1, 3), (1,), ()])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_gemm_head_with_a_bias_that_broadcasts(tmp_path: Path, shape: tuple[int, ...], batch: int) -> None:
    weights = {"classifier.weight": random(3, 8), "b": np.asarray(random(*shape))}
    nodes = [node("Gemm", ["x", "classifier.weight", "b"], ["y"], name="/classifier/Gemm", transB=1)]
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X2, outputs={"y": ["batch", 3]})
    package, x = _attach(file), random(batch, 8)
    assert_close(_base(package, {"x": x})[0], x @ weights["classifier.weight"].T + weights["b"])
    assert package.replaceable["classifier.weight"].free_outputs is False


def _called_twice(path: Path, module: str) -> Path:
    nodes = [
        _matmul("x", "w", "h", f"/{module}"),
        _matmul("h", "w", "g", f"/{module}_1"),
        _matmul("g", "v", "y", "/m/p"),
    ]
    weights = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    return save(path, nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]})


def test_a_module_of_several_nodes_cannot_be_asked_to_be_replaceable(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="used by 2 nodes"):
        attach(_called_twice(tmp_path / "m.onnx", "m/q"), tmp_path / "out", replaceable=["q"])
    assert not (tmp_path / "out").exists()


def test_a_module_of_several_nodes_with_a_copy_each_cannot_be_asked_to_be_replaceable(tmp_path: Path) -> None:
    nodes = [
        _matmul("x", "w1", "h", "/m/q"),
        node("MatMul", ["h", "w2"], ["g"], name="/m/q/MatMul_1"),
        _matmul("g", "v", "y", "/m/p"),
    ]
    weights = {"w1": random(8, 8), "w2": random(8, 8), "v": random(8, 8, seed=1)}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    with pytest.raises(ModelError, match="used by 2 nodes"):
        attach(file, tmp_path / "out", replaceable=["q"])


def test_a_head_of_several_nodes_is_not_replaceable(tmp_path: Path) -> None:
    package = _attach(_called_twice(tmp_path / "m.onnx", "classifier"))
    assert (list(package.replaceable), list(package.points)) == ([], ["m.p"])


def _two_norms(path: Path, second: str) -> Path:
    nodes = [
        node("LayerNormalization", ["x", "n1.weight", "n1.bias"], ["a"], name="/n1/LayerNormalization"),
        _matmul("a", "w", "h", "/m/q"),
        node("LayerNormalization", ["h", second, "n1.bias"], ["y"], name="/n2/LayerNormalization"),
    ]
    if second != "n1.weight":
        nodes.insert(0, node("Identity", ["n1.weight"], [second]))
    weights = {"n1.weight": random(8, seed=7), "n1.bias": random(8, seed=8), "w": random(8, 8)}
    return save(path, nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]})


def _normalized(x: Array) -> Array:
    return np.asarray((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5))


def test_a_norm_whose_weight_another_norm_uses_cannot_be_asked_to_be_replaceable(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="used by 2 nodes"):
        attach(_two_norms(tmp_path / "m.onnx", "n1.weight"), tmp_path / "out", replaceable=["n1"])


def test_a_norm_behind_an_identity_is_replaced_alone(tmp_path: Path) -> None:
    package = _attach(_two_norms(tmp_path / "m.onnx", "n2.weight"), replaceable=["n2"])
    x, other, bias = random(2, 3, 8), random(8, seed=3), random(8, seed=8)
    hidden = (_normalized(x) * random(8, seed=7) + bias) @ random(8, 8)
    assert_close(_base(package, {"x": x})[0], _normalized(hidden) * random(8, seed=7) + bias)
    replaced = _outputs(package, _adapter(replaced={"n2.weight": other}), {"x": x})[0]
    assert_close(replaced, _normalized(hidden) * other + bias)


@pytest.mark.parametrize("form", ["Gemm", "Transpose"])
def test_replacing_embeddings_leaves_a_tied_head_at_the_base(tmp_path: Path, form: str) -> None:
    nodes = [
        node("Gather", ["embed.weight", "ids"], ["e"]),
        _matmul("e", "w", "h", "/q"),
        node("ReduceMean", ["h", "axis"], ["p"], keepdims=0),
        *(
            [node("Gemm", ["p", "embed.weight"], ["y"], name="/lm_head/Gemm", transB=1)]
            if form == "Gemm"
            else [node("Transpose", ["embed.weight"], ["t"], perm=[1, 0]), _matmul("p", "t", "y", "/lm_head")]
        ),
    ]
    weights = {"embed.weight": random(20, 8), "w": random(8, 8), "axis": np.array([1])}
    shapes: dict[str, Any] = {"inputs": {"ids": ["batch", "seq"]}, "outputs": {"y": ["batch", 20]}}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, **shapes), targets=["q"], replaceable=["embed"])
    assert list(package.replaceable) == ["embed.weight"]
    ids, other = np.array([[1, 2, 3], [4, 1, 0]]), random(20, 8, seed=3)
    replaced = _outputs(package, _adapter(replaced={"embed.weight": other}), {"ids": ids})[0]
    assert_close(replaced, (other[ids] @ weights["w"]).mean(1) @ weights["embed.weight"].T)


def test_the_default_of_a_large_weight_lies_outside_the_graph_file(tmp_path: Path) -> None:
    nodes = [node("Gather", ["embed.weight", "ids"], ["e"]), _matmul("e", "w", "y", "/q")]
    weights = {"embed.weight": random(20000, 8), "w": random(8, 8)}
    shapes: dict[str, Any] = {"inputs": {"ids": ["batch", "seq"]}, "outputs": {"y": ["batch", "seq", 8]}}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, **shapes), replaceable=["embed"])
    assert (package.path / "model.onnx").stat().st_size < weights["embed.weight"].nbytes // 10


def test_a_head_whose_bias_is_added_behind_a_graph_output_has_its_weight_replaced_alone(tmp_path: Path) -> None:
    nodes = [_matmul("x", "w", "h", "/classifier"), node("Add", ["h", "b"], ["y"])]
    outputs: dict[str, Any] = {name: ["batch", "seq", 3] for name in ("y", "h")}
    file = save(tmp_path / "m.onnx", nodes, {"w": random(8, 3), "b": random(3)}, inputs=X3, outputs=outputs)
    package, x, other = _attach(file), random(2, 3, 8), random(3, 8, seed=3)
    assert list(package.replaceable) == ["classifier.weight"]
    y, h = _outputs(package, _adapter(replaced={"classifier.weight": other}), {"x": x})
    assert_close(h, x @ other.T)
    assert_close(y, x @ other.T + random(3))


def test_a_head_whose_bias_is_added_in_a_branch_has_its_weight_replaced_alone(tmp_path: Path) -> None:
    nodes = [_matmul("x", "w", "h", "/classifier"), _if([node("Add", ["h", "b"], ["t"])], "nothing")]
    weights = {"w": random(8, 3), "b": random(3), "nothing": np.zeros((1, 1, 3), np.float32)}
    package = _attach(_save_special(tmp_path / "m.onnx", nodes, weights, outputs={"y": ["batch", "seq", 3]}))
    feeds, other = {"x": random(2, 3, 8), "flag": np.array(True)}, random(3, 8, seed=3)
    assert list(package.replaceable) == ["classifier.weight"]
    replaced = _outputs(package, _adapter(replaced={"classifier.weight": other}), feeds)[0]
    assert_close(replaced, feeds["x"] @ other.T + weights["b"])


def test_a_head_of_a_vector_is_not_replaceable(tmp_path: Path) -> None:
    nodes = [_matmul("x", "w", "y", "/classifier"), _matmul("z", "v", "u", "/m/q")]
    inputs: dict[str, Any] = {"x": [8], "z": ["batch", 8]}
    outputs: dict[str, Any] = {"y": [3], "u": ["batch", 3]}
    weights = {"w": random(8, 3), "v": random(8, 3, seed=1)}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, inputs=inputs, outputs=outputs))
    assert (list(package.replaceable), list(package.points)) == ([], ["m.q"])
    assert "its input" in _reason(package, "/classifier/MatMul", "classifier")


def test_a_head_whose_input_has_any_number_of_axes_is_not_replaceable(tmp_path: Path) -> None:
    nodes = [
        node("Reshape", ["x", "ids"], ["h"]),
        _matmul("h", "w", "y", "/classifier"),
        _matmul("x", "v", "z", "/m/q"),
    ]
    inputs: dict[str, Any] = {**X3, "ids": ["axes"]}
    outputs: dict[str, Any] = {name: ["batch", "seq", 3] for name in ("y", "z")}
    weights = {"w": random(8, 3), "v": random(8, 3, seed=1)}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, inputs=inputs, outputs=outputs))
    assert (list(package.replaceable), list(package.points)) == ([], ["m.q"])
    assert "its input" in _reason(package, "/classifier/MatMul", "classifier")


def test_a_head_stored_in_half_precision_is_replaced_in_the_type_it_computes_in(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        _matmul("x", "w32", "h", "/classifier"),
        node("Cast", ["b"], ["b32"], to=TensorProto.FLOAT),
        node("Add", ["h", "b32"], ["y"]),
    ]
    weights = {"w": random(8, 3).astype(np.float16), "b": random(3).astype(np.float16)}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 3]})
    package, x = _attach(file), random(2, 3, 8)
    assert_close(_base(package, {"x": x})[0], x @ weights["w"].astype(np.float32) + weights["b"])
    # Values that half precision holds exactly: folding stores them as the base does.
    other, bias = (random(*shape, seed=3).astype(np.float16).astype(np.float32) for shape in ((3, 8), (3,)))
    adapter = _adapter(replaced={"classifier.weight": other, "classifier.bias": bias})
    assert_close(_outputs(package, adapter, {"x": x})[0], x @ other.T + bias)


# Points: at every node of a module, or at none.


def test_a_module_with_a_node_in_a_branch_gets_no_point(tmp_path: Path) -> None:
    nodes = [
        _matmul("x", "w", "h", "/m/q"),
        _matmul("h", "v", "g", "/m/p"),
        _if([_matmul("g", "w", "t", "/m/q_1")], "g"),
    ]
    weights = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    package = _attach(_save_special(tmp_path / "m.onnx", nodes, weights, outputs={"y": X3["x"]}))
    assert list(package.points) == ["m.p"]
    assert "branch or loop" in _reason(package, "/m/q_1/MatMul")
    assert _reason(package, "/m/q/MatMul", "m.q")


def test_a_module_with_a_scaled_gemm_gets_no_point(tmp_path: Path) -> None:
    nodes = [
        _matmul("x", "w", "h", "/m/q"),
        node("Gemm", ["h", "w"], ["g"], name="/m/q_1/Gemm", alpha=0.5),
        _matmul("g", "v", "y", "/m/p"),
    ]
    weights = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, inputs=X2, outputs={"y": ["batch", 8]}))
    assert list(package.points) == ["m.p"]
    assert "alpha" in _reason(package, "/m/q_1/Gemm")
    assert _reason(package, "/m/q/MatMul", "m.q")


def test_a_module_used_inside_a_function_gets_its_point_there_too(tmp_path: Path) -> None:
    inner = [node("MatMul", ["a", "b"], ["c"], name="/m/q/MatMul")]
    function = helper.make_function("acme", "Linear", ["a", "b"], ["c"], inner, [helper.make_opsetid("", 18)])
    nodes = [
        _matmul("x", "m.q.weight", "h", "/m/q"),
        node("Linear", ["h", "m.q.weight"], ["y"], domain="acme", name="/m/q_1"),
    ]
    weights, outputs = {"m.q.weight": random(8, 8)}, {"y": X3["x"]}
    file = _save_special(tmp_path / "m.onnx", nodes, weights, outputs=outputs, functions=[function], domains=["acme"])
    package, delta, x = _attach(file), _delta(8, 8), random(2, 3, 8)
    assert list(package.points) == ["m.q"]
    whole = weights["m.q.weight"] + _product(delta)
    assert_close(_outputs(package, _adapter({"m.q": delta}), {"x": x})[0], x @ whole @ whole)


def test_a_fused_matmul_is_listed(tmp_path: Path) -> None:
    nodes = [
        _matmul("x", "w", "h", "/m/p"),
        node("FusedMatMul", ["h", "v"], ["y"], domain="com.microsoft", name="/m/q/MatMul"),
    ]
    weights = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    file = _save_special(tmp_path / "m.onnx", nodes, weights, outputs={"y": X3["x"]}, domains=["com.microsoft"])
    package = _attach(file)
    assert list(package.points) == ["m.p"]
    assert "FusedMatMul" in _reason(package, "/m/q/MatMul")


def _pair(folder: Path, first: Sequence[onnx.NodeProto], second: Sequence[onnx.NodeProto], **seeds: int) -> Package:
    """A package of graphs a and b: h = q(x), y = p(h); `seeds` are those of q's weight."""
    folder.mkdir()
    for name, nodes in (("a", first), ("b", second)):
        weights = {"w": random(8, 8, seed=seeds.get(name, 0)), "v": random(8, 8, seed=1)}
        all_nodes = [*nodes, _matmul("h", "v", "y", "/m/p")]
        save(folder / f"{name}.onnx", all_nodes, weights, inputs=X2, outputs={"y": ["batch", 8]})
    return _attach(folder)


def test_a_module_that_one_graph_cannot_place_has_no_point_in_another(tmp_path: Path) -> None:
    scaled = node("Gemm", ["x", "w"], ["h"], name="/m/q/Gemm", alpha=0.5)
    package = _pair(tmp_path / "in", [_matmul("x", "w", "h", "/m/q")], [scaled])
    assert [[point.module for point in graph.points] for graph in package.manifest.graphs] == [["m.p"], ["m.p"]]
    assert _reason(package, "/m/q/MatMul", "m.q", graph="a")
    assert "alpha" in _reason(package, "/m/q/Gemm", graph="b")


def test_a_name_with_other_weights_in_another_graph_is_no_point_in_either(tmp_path: Path) -> None:
    nodes = [_matmul("x", "w", "h", "/m/q")]
    package = _pair(tmp_path / "in", nodes, nodes, a=2, b=3)
    assert [[point.module for point in graph.points] for graph in package.manifest.graphs] == [["m.p"], ["m.p"]]
    for graph in ("a", "b"):
        assert "different weights" in _reason(package, "/m/q/MatMul", "m.q", graph=graph)
    delta, x = _delta(8, 8), random(2, 8)
    for graph, seed in (("a", 2), ("b", 3)):
        expected = x @ random(8, 8, seed=seed) @ (random(8, 8, seed=1) + _product(delta))
        assert_close(_outputs(package, _adapter({"m.p": delta}), {"x": x}, graph)[0], expected)


@pytest.mark.parametrize("first, second", [("a", "b"), ("b", "a")])
def test_rows_that_one_graph_cannot_tell_apart_are_no_rows_of_the_package(
    tmp_path: Path, first: str, second: str
) -> None:
    turned = [node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]), _matmul("xt", "w", "y", "/m/q")]
    straight = [_matmul("x", "w", "y", "/m/q")]
    for name, nodes, axes in ((first, turned, ("seq", "batch")), (second, straight, ("batch", "seq"))):
        save(tmp_path / "in" / f"{name}.onnx", nodes, {"w": random(8, 6)}, inputs=X3, outputs={"y": [*axes, 6]})
    assert not _attach(tmp_path / "in").points["m.q"].per_row


def _equal_layers(path: Path, first: str, second: str) -> tuple[Package, Array]:
    """Two layers of q and k packed, all weights equal; the checkpoint calls them layers.0 and layers.1."""
    pieces = {"q": random(6, 8, seed=1), "k": random(2, 8, seed=2)}
    checkpoint = {f"layers.{layer}.{name}": value for layer in (0, 1) for name, value in pieces.items()}
    packed = np.concatenate(list(pieces.values())).T.copy()
    nodes = [
        _matmul("x", "w0", "h", f"/{first}/qk"),
        node("Tanh", ["h"], ["t"]),
        _matmul("t", "w1", "g", f"/{second}/qk"),
        _matmul("g", "v", "y", "/out"),
    ]
    weights = {"w0": packed, "w1": packed.copy(), "v": random(8, 8)}
    file = save(path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    named = _checkpoint(path / "checkpoint", checkpoint | {"out": weights["v"].T})
    return _attach(file, checkpoint=named), packed


def test_layers_with_equal_packed_weights_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    package, packed = _equal_layers(tmp_path, "layers.0", "layers.1")
    assert set(package.points) == {f"layers.{layer}.{name}" for layer in (0, 1) for name in "qk"} | {"out"}
    for layer in (0, 1):
        delta, x = _delta(8, 6), random(2, 3, 8)
        changed = [packed.copy(), packed.copy()]
        changed[layer][:, :6] += _product(delta)
        got = _outputs(package, _adapter({f"layers.{layer}.q": delta}), {"x": x})[0]
        assert_close(got, np.tanh(x @ changed[0]) @ changed[1] @ random(8, 8))


def test_layers_with_equal_packed_weights_and_no_numbers_get_no_points(tmp_path: Path) -> None:
    package, _ = _equal_layers(tmp_path, "first", "second")
    assert list(package.points) == ["out"]
    for name in ("first", "second"):
        assert _reason(package, f"/{name}/qk/MatMul")


def test_equal_pieces_of_a_packed_projection_get_no_points(tmp_path: Path) -> None:
    query, zeros = random(6, 8, seed=1), np.zeros((1, 8), np.float32)
    nodes = [_matmul("x", "w", "h", "/l/qkv"), _matmul("h", "v", "y", "/l/o")]
    weights = {"w": np.concatenate([query, zeros, zeros]).T.copy(), "v": random(8, 8)}
    names = {"l.q": query, "l.k": zeros, "l.v": zeros, "l.o": weights["v"].T}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    package = _attach(file, checkpoint=_checkpoint(tmp_path / "checkpoint", names))
    assert "l.o" in package.points
    assert package.points.keys().isdisjoint({"l.k", "l.v"})
    assert _reason(package, "/l/qkv/MatMul", "l.k", "l.v")
    delta, x = _delta(8, 8), random(2, 3, 8)
    assert_close(_base(package, {"x": x})[0], x @ weights["w"] @ weights["v"])
    got = _outputs(package, _adapter({"l.o": delta}), {"x": x})[0]
    assert_close(got, x @ weights["w"] @ (weights["v"] + _product(delta)))


@pytest.mark.parametrize("width", [1, 6])
def test_a_module_packed_in_one_node_and_alone_in_another_changes_in_both(tmp_path: Path, width: int) -> None:
    query, key = random(width, 8, seed=1), random(2, 8, seed=2)
    packed = np.concatenate([query, key]).T.copy()
    nodes = [
        _matmul("x", "w", "h", "/l/qk"),
        _matmul("x", "k", "g", "/l/k"),
        node("Concat", ["h", "g"], ["y"], axis=-1),
    ]
    weights = {"w": packed, "k": key.T.copy()}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", width + 4]})
    package = _attach(file, checkpoint=_checkpoint(tmp_path / "checkpoint", {"l.q": query, "l.k": key}))
    assert set(package.points) == {"l.q", "l.k"}
    x, base = random(2, 3, 8), np.concatenate([packed, key.T], axis=1)
    assert_close(_base(package, {"x": x})[0], x @ base)
    one, other = _delta(8, 2), _delta(8, width, seed=20)
    none = np.zeros((8, width), np.float32)
    got = _outputs(package, _adapter({"l.k": one}), {"x": x})[0]
    assert_close(got, x @ (base + np.concatenate([none, _product(one), _product(one)], axis=1)))
    got = _outputs(package, _adapter({"l.k": one, "l.q": other}), {"x": x})[0]
    assert_close(got, x @ (base + np.concatenate([_product(other), _product(one), _product(one)], axis=1)))


@pytest.mark.parametrize(
    "axes, rest", [(("h", "w"), [-1, 2, 3]), (("h", "w"), [-1, 1, 6]), (("seq",), [-1, 3])], ids=["2x3", "1x6", "3"]
)
def test_rows_reshaped_to_other_axes_than_they_came_from(
    tmp_path: Path, axes: tuple[str, ...], rest: list[int]
) -> None:
    nodes = [
        node("Reshape", ["x", "flat"], ["x2"]),
        _matmul("x2", "w", "z", "/m/q"),
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "zero", "one"], ["batch"]),
        node("Concat", ["batch", "rest"], ["shape"], axis=0),
        node("Reshape", ["z", "shape"], ["y"]),
    ]
    indices = {"flat": [-1, 8], "zero": [0], "one": [1], "rest": rest}
    weights = {"w": random(8, 6)} | {name: np.array(value) for name, value in indices.items()}
    shapes: dict[str, Any] = {"inputs": {"x": ["batch", *axes, 8]}, "outputs": {"y": ["batch", "n", *rest[1:]]}}
    package, delta = _attach(save(tmp_path / "m.onnx", nodes, weights, **shapes)), _delta(8, 6)
    for sizes in ((1, 4), (3, 4)):
        x = random(2, *sizes[-len(axes) :], 8)
        base, changed = weights["w"], weights["w"] + _product(delta)
        assert_close(_base(package, {"x": x})[0], (x.reshape(-1, 8) @ base).reshape(2, *rest))
        got = _outputs(package, _adapter({"m.q": delta}), {"x": x})[0]
        assert_close(got, (x.reshape(-1, 8) @ changed).reshape(2, *rest))


def test_a_transpose_that_changes_nothing_is_no_transpose(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["w"], ["same"], perm=[0, 1]), _matmul("x", "same", "y", "/m/q")]
    file = save(tmp_path / "m.onnx", nodes, {"w": random(8, 8)}, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    package, delta, x = _attach(file), _delta(8, 8), random(2, 3, 8)
    assert not package.points["m.q"].parts[0].transposed
    assert_close(_outputs(package, _adapter({"m.q": delta}), {"x": x})[0], x @ (random(8, 8) + _product(delta)))


def test_a_module_of_a_weight_and_its_transpose_gets_no_point(tmp_path: Path) -> None:
    nodes = [
        _matmul("x", "w", "h", "/m/q"),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["h", "t"], ["g"], name="/m/q/MatMul_1"),
        _matmul("g", "v", "y", "/m/p"),
    ]
    weights = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]}))
    assert list(package.points) == ["m.p"]
    assert _reason(package, "m.q", "/m/q/MatMul", "/m/q/MatMul_1")


def test_a_tied_module_that_the_checkpoint_does_not_name_stays_as_it_is(tmp_path: Path) -> None:
    weight = random(8, 8)
    nodes = [_matmul("x", "w", "h", "/enc/q"), _matmul("h", "w", "y", "/dec/p")]
    file = save(tmp_path / "m.onnx", nodes, {"w": weight}, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    package = _attach(file, checkpoint=_checkpoint(tmp_path / "checkpoint", {"enc.q": weight.T}))
    assert list(package.points) == ["enc.q"]
    assert _reason(package, "/dec/p/MatMul")
    delta, x = _delta(8, 8), random(2, 3, 8)
    got = _outputs(package, _adapter({"enc.q": delta}), {"x": x})[0]
    assert_close(got, x @ (weight + _product(delta)) @ weight)


def test_calls_of_a_module_with_a_copy_of_its_weight_each_are_one_point(tmp_path: Path) -> None:
    nodes = [_matmul("x", "w1", "h", "/m/q"), _matmul("h", "w2", "y", "/m/q_1")]
    weights = {"w1": random(8, 8), "w2": random(8, 8)}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]}))
    assert list(package.points) == ["m.q"]
    delta, x = _delta(8, 8), random(2, 3, 8)
    whole = weights["w1"] + _product(delta)
    assert_close(_outputs(package, _adapter({"m.q": delta}), {"x": x})[0], x @ whole @ whole)


def test_folding_leaves_a_weight_that_is_a_graph_output_as_it_was(tmp_path: Path) -> None:
    outputs: dict[str, Any] = {"y": ["batch", "seq", 6], "w": [8, 6]}
    file = save(tmp_path / "m.onnx", [_matmul("x", "w", "y", "/m/q")], {"w": random(8, 6)}, inputs=X3, outputs=outputs)
    package, delta, x = _attach(file), _delta(8, 6), random(2, 3, 8)
    y, w = fold(package, _adapter({"m.q": delta})).run(None, {"x": x})
    assert_same_bits(w, random(8, 6))
    assert_close(y, x @ (random(8, 6) + _product(delta)))


def test_a_symbol_of_two_axes_is_no_batch(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]), _matmul("xt", "w", "y", "/m/q")]
    shapes: dict[str, Any] = {"inputs": {"x": ["n", "n", 8]}, "outputs": {"y": ["n", "n", 6]}}
    assert not _attach(save(tmp_path / "m.onnx", nodes, {"w": random(8, 6)}, **shapes)).points["m.q"].per_row


def test_a_symmetric_weight_is_placed_by_its_name(tmp_path: Path) -> None:
    """Zeros are equal in both of torch's layouts: one module found twice is one module."""
    nodes = [_matmul("x", "w", "h", "/m/q"), _matmul("h", "v", "y", "/m/p")]
    weights = {"w": np.zeros((8, 8), np.float32), "v": random(8, 8)}
    file = save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]})
    names = {"m.q": weights["w"], "m.p": weights["v"].T}
    package = _attach(file, checkpoint=_checkpoint(tmp_path / "checkpoint", names))
    assert (list(package.points), package.graph().unplaced) == (["m.q", "m.p"], ())
    delta, x = _delta(8, 8), random(2, 3, 8)
    assert_close(_outputs(package, _adapter({"m.q": delta}), {"x": x})[0], x @ _product(delta) @ weights["v"])


def test_a_module_that_computes_in_bfloat16_is_listed(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["x"], ["x16"], to=TensorProto.BFLOAT16),
        node("Cast", ["w"], ["w16"], to=TensorProto.BFLOAT16),
        _matmul("x16", "w16", "h", "/m/q"),
        node("Cast", ["h"], ["h32"], to=TensorProto.FLOAT),
        _matmul("h32", "v", "y", "/m/p"),
    ]
    weights = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]}))
    assert list(package.points) == ["m.p"]
    assert "bfloat16" in _reason(package, "/m/q/MatMul", "m.q").lower()


def test_a_weight_rounded_to_bfloat16_is_listed(tmp_path: Path) -> None:
    """Folded, a delta would be rounded with it."""
    nodes = [
        node("Cast", ["w"], ["w16"], to=TensorProto.BFLOAT16),
        node("Cast", ["w16"], ["w32"], to=TensorProto.FLOAT),
        _matmul("x", "w32", "h", "/m/q"),
        _matmul("h", "v", "y", "/m/p"),
    ]
    weights = {"w": random(8, 8), "v": random(8, 8, seed=1)}
    package = _attach(save(tmp_path / "m.onnx", nodes, weights, inputs=X3, outputs={"y": ["batch", "seq", 8]}))
    assert list(package.points) == ["m.p"]
    assert "bfloat16" in _reason(package, "/m/q/MatMul", "m.q").lower()


# Torch modules: `export` verifies what it made, so each of these would raise.


class _Named(nn.Module):
    """`q` and `enc.q`: one name ends the other."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.enc = nn.ModuleDict({"q": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.enc["q"](torch.tanh(self.q(x)))


class _Attention(nn.Module):
    """Torch multiplies with out_proj's weight itself: what PEFT does to the module is another matter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class _HeadOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x.mean(1))


def _odd_names() -> nn.Module:
    model = nn.Sequential()
    for name in ("a(b", "a+", "a"):
        model.add_module(name, nn.Linear(8, 8))
    return model


@pytest.mark.parametrize(
    "make, batch, options, points, replaceable",
    [
        pytest.param(_Named, 4, {}, {"q", "enc.q"}, set(), id="a batch of four"),
        pytest.param(_Named, 2, {"targets": ["q"]}, {"q", "enc.q"}, set(), id="a suffix of another name"),
        pytest.param(_Named, 2, {"targets": "q"}, {"q"}, set(), id="a whole name as an expression"),
        pytest.param(_odd_names, 2, {}, {"a(b", "a+", "a"}, set(), id="names with an expression's characters"),
        pytest.param(_Attention, 2, {}, {"out"}, set(), id="torch's own attention"),
        pytest.param(_HeadOnly, 2, {}, set(), {"classifier.weight", "classifier.bias"}, id="a head and nothing else"),
    ],
)
def test_an_unusual_torch_module_is_exported_and_verified(
    tmp_path: Path,
    make: Callable[[], nn.Module],
    batch: int,
    options: dict[str, Any],
    points: set[str],
    replaceable: set[str],
) -> None:
    torch.manual_seed(0)
    package = export(make(), tmp_path / "out", example_inputs=(torch.randn(batch, 3, 8),), **options)
    _check_inputs(package)
    assert (set(package.points), set(package.replaceable)) == (points, replaceable)
