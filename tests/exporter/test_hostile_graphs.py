"""ONNX files that are damaged, or made to harm: each is refused by name, in bounded time and memory, whatever foreign
library stumbles over it."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from onnx_lora.errors import ExportError, ModelError
from onnx_lora.exporter import attach, export
from onnx_lora.exporter.foreign_libraries import name_step
from onnx_lora.exporter.intake import load, onnx_file
from onnx_lora.exporter.ort_check import blamed_on_damage
from tests.support.exporters import HAS_OPTIMUM, VIA
from tests.support.graphs import random, save
from tests.support.numbers import assert_close

node = helper.make_node
X = {"x": ["batch", "seq", 8]}
Y = {"y": ["batch", "seq", 8]}


def plain(path: Path, *, external: bool = False) -> Path:
    nodes = [node("MatMul", ["x", "w"], ["y"], name="/m/q/MatMul")]
    return save(path / "m.onnx", nodes, {"w": random(8, 8)}, inputs=X, outputs=Y, external=external)


def edited(path: Path, edit: Callable[[onnx.ModelProto], None], *, external: bool = False) -> Path:
    """A plain graph with its protobuf changed behind the checker's back."""
    file = plain(path, external=external)
    model = onnx.load(file, load_external_data=False)
    edit(model)
    file.write_bytes(model.SerializeToString())
    return file


# --- functions -----------------------------------------------------------------------------------


def calling(path: Path, made: list[onnx.FunctionProto], call: str) -> Path:
    graph = helper.make_graph(
        [node(call, ["x", "m.q.weight"], ["y"], domain="local", name="/m/q/Call")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", 8])],
        [numpy_helper.from_array(random(8, 8), "m.q.weight")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    path.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=made, ir_version=8), path / "m.onnx")
    return path / "m.onnx"


def function(name: str, nodes: list[onnx.NodeProto], *, version: int = 18) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", version), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a", "b"], ["c"], nodes, opsets)


@pytest.mark.parametrize("version", [13, 17, 18])
def test_functions_of_another_version_mean_the_same_where_their_operators_do(tmp_path: Path, version: int) -> None:
    inner = [node("MatMul", ["a", "b"], ["t"]), node("Tanh", ["t"], ["c"])]
    file = calling(tmp_path, [function("Inner", inner, version=version)], "Inner")
    x = random(2, 3, 8)
    (wanted,) = ort.InferenceSession(file).run(None, {"x": x})
    package = attach(file, tmp_path / "out")
    assert list(package.points) == ["m.q"]
    (got,) = ort.InferenceSession(package.path / package.graph().file).run(None, {"x": x})
    assert_close(got, wanted)


def test_functions_whose_operators_changed_are_refused_by_name(tmp_path: Path) -> None:
    """ReduceSum has its axes as an input since version 13."""
    inner = [node("MatMul", ["a", "b"], ["t"]), node("ReduceSum", ["t"], ["c"], axes=[1], keepdims=1)]
    made = [function("Inner", inner, version=12)]
    with pytest.raises(ModelError, match=r"mean those of 12, where MatMul, ReduceSum are others; export it again"):
        attach(calling(tmp_path, made, "Inner"), tmp_path / "out")


def test_functions_that_call_themselves_are_refused(tmp_path: Path) -> None:
    made = [
        function("One", [node("Two", ["a", "b"], ["c"], domain="local")]),
        function("Two", [node("One", ["a", "b"], ["c"], domain="local")]),
    ]
    with pytest.raises(ModelError, match="must not call themselves"):
        attach(calling(tmp_path, made, "One"), tmp_path / "out")


def test_functions_that_double_with_every_call_are_refused_at_once(tmp_path: Path) -> None:
    made = [function("F0", [node("MatMul", ["a", "b"], ["c"])])]
    for index in range(1, 60):
        calls = [node(f"F{index - 1}", ["a", "b"], ["t"], domain="local")]
        calls.append(node(f"F{index - 1}", ["t", "b"], ["c"], domain="local"))
        made.append(function(f"F{index}", calls))
    began = time.process_time()
    with pytest.raises(ModelError, match="no graph can hold it"):
        attach(calling(tmp_path, made, "F59"), tmp_path / "out")
    assert time.process_time() - began < 30


def test_an_attribute_that_refers_to_no_function_is_refused(tmp_path: Path) -> None:
    def refer(model: onnx.ModelProto) -> None:
        attribute = model.graph.node[0].attribute.add()
        attribute.name, attribute.ref_attr_name, attribute.type = "transB", "outer", onnx.AttributeProto.INT
        model.graph.node[0].op_type = "Gemm"
        model.graph.input[0].type.tensor_type.shape.dim.pop()

    with pytest.raises(ModelError):
        attach(edited(tmp_path, refer), tmp_path / "out")


# --- tensors -------------------------------------------------------------------------------------


def place(**entries: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        for entry in model.graph.initializer[0].external_data:
            entry.value = entries.get(entry.key, entry.value)

    return edit


def constant(**entries: str) -> Callable[[onnx.ModelProto], None]:
    """The same place for a node's constant: it is read as an initializer is."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        place(**entries)(model)
        model.graph.node.insert(0, node("Constant", [], ["w"], value=tensor))
        del model.graph.initializer[:]

    return edit


@pytest.mark.parametrize("kind", [place, constant], ids=["initializer", "constant"])
@pytest.mark.parametrize(
    "entries, words",
    [
        ({"location": "../outside"}, "must lie in the model's folder"),
        ({"location": "/etc/hostname"}, "must lie in the model's folder"),
        ({"location": ""}, "must lie in the model's folder"),
        ({"location": "link"}, "must lie in the model's folder"),
        ({"location": "a\0b"}, "cannot be a file"),
        ({"location": "x" * 5000}, "cannot be a file"),
        ({"location": "gone"}, "gone is missing"),
        ({"offset": "-4"}, "offset '-4'"),
        ({"offset": "9" * 400}, "offset '999"),
        ({"offset": "4611686018427387904"}, "was cut off"),
        ({"offset": "1e3"}, "offset '1e3'"),
        ({"length": "-1"}, "length '-1'"),
        ({"length": "7"}, "length '7'"),
    ],
)
def test_tensors_lie_in_the_folder_and_are_whole(
    tmp_path: Path, kind: Callable[..., Any], entries: dict[str, str], words: str
) -> None:
    (tmp_path / "outside").write_bytes(bytes(1000))
    file = edited(tmp_path / "in", kind(**entries), external=True)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(ModelError, match="its tensors must be whole") as error:
        attach(file, tmp_path / "out")
    assert words in str(error.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in", "outside"}


@pytest.mark.parametrize("dims", [[10**6, 10**6], [2**62, 2**62], [-8, -8], [8, 9]])
def test_a_tensor_that_claims_more_than_it_holds_takes_no_memory(tmp_path: Path, dims: list[int]) -> None:
    def claim(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = dims

    file = edited(tmp_path, claim)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="its tensors must be whole"):
            attach(file, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [0, TensorProto.STRING, 99, TensorProto.UINT4, TensorProto.COMPLEX64])
@pytest.mark.parametrize("external", [True, False])
def test_a_weight_of_another_type_is_refused(tmp_path: Path, kind: int, external: bool) -> None:
    def retype(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].data_type = kind

    with pytest.raises(ModelError):
        attach(edited(tmp_path, retype, external=external), tmp_path / "out")


def test_an_initializer_is_what_its_tensor_is_whatever_is_noted_of_it(tmp_path: Path) -> None:
    def note(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, ["rows", None]))

    package = attach(edited(tmp_path, note), tmp_path / "out")
    assert (package.points["m.q"].in_features, package.points["m.q"].out_features) == (8, 8)


def test_groups_that_no_convolution_can_have_are_refused(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "c.weight"], ["y"], name="/c/Conv", group=2)]
    shapes: dict[str, Any] = {"inputs": {"x": ["b", 4, "h", "w"]}, "outputs": {"y": ["b", 4, "h", "w"]}}
    file = save(tmp_path / "m.onnx", nodes, {"c.weight": random(4, 2, 1, 1)}, **shapes)
    model = onnx.load(file)
    model.graph.node[0].attribute[0].i = 2**63 - 1
    onnx.save(model, file)
    with pytest.raises(ModelError):
        attach(file, tmp_path / "out", targets="all")


# --- what is no graph ----------------------------------------------------------------------------


def nested(depth: int) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        inner = helper.make_graph([node("Identity", ["x"], ["z"])], "g", [], [model.graph.output[0]])
        for _ in range(depth):
            inner = helper.make_graph([node("If", ["f"], ["z"], then_branch=inner, else_branch=inner)], "g", [], [])
        model.graph.node.append(inner.node[0])

    return edit


def repeated(model: onnx.ModelProto) -> None:
    model.graph.node.extend([model.graph.node[0]] * 2)


def nameless(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[1] = "nobody"


def versionless(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def far(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 2**62


@pytest.mark.parametrize("edit", [nested(2), nested(12), repeated, nameless, versionless, far])
def test_what_is_no_graph_is_refused(tmp_path: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    with pytest.raises(ModelError):
        attach(edited(tmp_path, edit), tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\0", b"\x0a\xff\xff\xff\xff\x0f", b"\x3a" * 1000, b"{}", b"\xff" * 99])
def test_what_is_no_protobuf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError):
        attach(tmp_path / "m.onnx", tmp_path / "out")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = plain(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"/m/q/MatMul", b"/m/q/\xff\xfetMul"))
    with pytest.raises(ModelError, match="no text"):
        attach(file, tmp_path / "out")


# --- the boundary --------------------------------------------------------------------------------


class OddError(Exception):
    """A foreign library's own."""


@pytest.mark.parametrize("thrown", [OddError("it broke"), KeyError(3), AssertionError(), RecursionError("too deep")])
@pytest.mark.parametrize(
    "module, name, step",
    [
        (onnx_file.onnx, "load", "reading it"),
        (onnx_file.ir, "from_proto", "reading it"),
        (load, "LiftConstantsToInitializersPass", "lifting its constants"),
        (sys.modules["onnx_lora.exporter.build"], "infer_shapes", "inferring its shapes"),
    ],
)
def test_whatever_a_library_throws_names_the_step_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, step: str, thrown: Exception
) -> None:
    def throw(*_: Any, **__: Any) -> None:
        raise thrown

    file = plain(tmp_path)
    monkeypatch.setattr(module, name, throw)
    with pytest.raises(ModelError, match=f"{step} failed") as error:
        attach(file, tmp_path / "out")
    assert str(file) in str(error.value)
    assert error.value.__cause__ is thrown


def test_memory_that_runs_out_and_disks_that_fail_are_no_damage() -> None:
    with pytest.raises(ExportError, match="memory ran out"), name_step("trying", "f"):
        raise MemoryError
    with pytest.raises(OSError, match="disk"), name_step("trying", "f"):
        raise OSError(28, "disk")


def test_a_fault_of_ours_stays_one_where_onnx_runtime_opens_the_graph(tmp_path: Path) -> None:
    good, bad = plain(tmp_path / "good"), edited(tmp_path / "bad", nameless)
    with pytest.raises(IndexError), blamed_on_damage([good]):
        raise IndexError
    with pytest.raises(ModelError, match="ONNX Runtime cannot open it"), blamed_on_damage([good, bad]):
        raise IndexError


class Stumbling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return {}["key"]  # type: ignore[no-any-return]


def test_a_module_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="could not export Stumbling"):
        export(Stumbling(), tmp_path / "out", example_inputs=(torch.zeros(2, 3),))


@pytest.mark.skipif(not HAS_OPTIMUM, reason="only Optimum looks for the image processor")
def test_a_vision_model_without_its_image_processor_says_what_is_missing(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    hf.Dinov2ForImageClassification(hf.Dinov2Config(**sizes)).save_pretrained(tmp_path / "in")
    with pytest.raises(ExportError, match=r"copy the model's preprocessor_config\.json"):
        export(tmp_path / "in", tmp_path / "out")
    size = '{"image_processor_type": "BitImageProcessor", "crop_size": {"height": 28, "width": 28}}'
    (tmp_path / "in" / "preprocessor_config.json").write_text(size)
    assert export(tmp_path / "in", tmp_path / "out").points


def test_code_that_comes_with_a_checkpoint_is_not_run_and_nobody_is_asked(tmp_path: Path) -> None:
    place = tmp_path / "in"
    place.mkdir()
    (place / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = {"model_type": "own", "architectures": ["Model"], "auto_map": classes}
    (place / "config.json").write_text(json.dumps(config))
    for via in (VIA, "genai") if find_spec("onnxruntime_genai") else (VIA,):
        with pytest.raises((ModelError, ExportError)):
            export(place, tmp_path / "out", via=via, task="text-generation-with-past")
    assert {entry.name for entry in tmp_path.iterdir()} == {"in"}


def test_shape_inference_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of some damaged graphs the tool finds the same sizes to be equal, and begins anew, for ever."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    # Of the product's output the graph says no shape itself.
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="/q/MatMul"), helper.make_node("Relu", ["h"], ["y"])]
    shapes: dict[str, Any] = {"inputs": {"x": ["batch", "seq", 4]}, "outputs": {"y": ["batch", "seq", 6]}}
    file = save(tmp_path / "in" / "m.onnx", nodes, {"w": random(4, 6)}, **shapes)
    monkeypatch.setattr(SymbolicShapeInference, "_infer_impl", lambda *_: None)
    assert not attach(file, tmp_path / "out").points["q"].per_row
