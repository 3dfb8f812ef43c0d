"""What the exporter takes from ONNX and ONNX Runtime that they do not promise. A failure here says what has moved, and
which file of ours to look at."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lora.exporter import ort_check
from onnx_lora.exporter.graph import axes
from onnx_lora.exporter.intake import load
from onnx_lora.onnxruntime_errors import is_unsupported, native_failures

_AXES = "onnx_lora/exporter/graph/axes.py: _infer and _infer_symbolically"
_LOAD = "onnx_lora/exporter/intake/load.py: check"
_ORT = "onnx_lora/onnxruntime_errors.py: _UNSUPPORTED; onnx_lora/exporter/ort_check.py: check_opens"


def _model(op_type: str, *, domain: str = "", kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x", "w"], ["y"], domain=domain)
    x = helper.make_tensor_value_info("x", kind, ["batch", "seq", 4])
    y = helper.make_tensor_value_info("y", kind, ["batch", "seq", 6])
    numbers = np.ones((4, 6), helper.tensor_dtype_to_np_dtype(kind))
    graph = helper.make_graph([node], "graph", [x], [y], [numpy_helper.from_array(numbers, "w")])
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


@pytest.mark.parametrize("name", ["_preprocess", "_infer_impl", "_update_output_from_vi"])
def test_symbolic_shape_inference_has_the_steps_that_are_called(name: str) -> None:
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    assert callable(getattr(SymbolicShapeInference, name, None)), f"{name} has moved; see {_AXES}"


def test_symbolic_shape_inference_takes_what_it_is_given() -> None:
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    parameters = list(inspect.signature(SymbolicShapeInference.__init__).parameters)
    assert parameters == ["self", "int_max", "auto_merge", "guess_output_rank", "verbose", "prefix"], _AXES
    # What its public entry point does, which ours repeats without the file that it leaves when it gives up.
    public = inspect.getsource(SymbolicShapeInference.infer_shapes)
    for step in ("_preprocess(in_mp)", "while symbolic_shape_inference.run_", "_infer_impl()", "out_mp_"):
        assert step in public, f"infer_shapes has no {step} any more; see {_AXES}"


def test_symbolic_shape_inference_gives_every_value_its_symbols() -> None:
    model = _model("MatMul")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred, certain = axes._infer(model)
    shape = inferred.output[0].type.tensor_type.shape
    assert certain, _AXES
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", "seq", 6], _AXES


def test_symbolic_shape_inference_logs_where_it_is_silenced_and_keeps_its_level() -> None:
    tool = logging.getLogger("onnxruntime.tools.symbolic_shape_infer")
    from onnxruntime.tools import symbolic_shape_infer

    assert symbolic_shape_infer.logger is tool, _AXES
    before = tool.level
    axes._infer(_model("MatMul"))
    assert tool.level == before


def test_onnx_makes_up_symbols_of_one_beginning() -> None:
    """Two of a model's own symbols are never joined, so what a Concat of them gives is a new one."""
    node = helper.make_node("Concat", ["a", "b"], ["c"], axis=0)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [name.upper(), 4]) for name in "ab"]
    graph = helper.make_graph([node], "graph", inputs, [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)])
    inferred = onnx.shape_inference.infer_shapes(helper.make_model(graph)).graph.output[0]
    symbol = inferred.type.tensor_type.shape.dim[0].dim_param
    assert symbol == "" or symbol.startswith(axes._MADE_UP), "onnx_lora/exporter/graph/axes.py: _MADE_UP"


def test_the_checker_says_of_operators_of_onnx_runtime_that_they_are_not_registered(tmp_path: Path) -> None:
    onnx.save(_model("SimplifiedLayerNormalization"), tmp_path / "m.onnx")
    with pytest.raises(onnx.checker.ValidationError, match=r"^No Op registered for SimplifiedLayerNormalization"):
        onnx.checker.check_model(str(tmp_path / "m.onnx"))
    load.check(tmp_path / "m.onnx", tmp_path / "m.onnx")


def test_the_checker_says_of_linked_data_that_it_is_a_link(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    onnx.save(_model("MatMul"), file, save_as_external_data=True, location="data", size_threshold=0)
    (tmp_path / "data").rename(tmp_path / "blob")
    (tmp_path / "data").symlink_to(tmp_path / "blob")
    with pytest.raises(onnx.checker.ValidationError, match=r"but it is a symbolic link\.$"):
        onnx.checker.check_model(str(file))
    load.check(file, file)


def test_onnx_runtime_says_what_it_has_no_kernel_for_and_what_it_does_not_know(tmp_path: Path) -> None:
    onnx.save(_model("MatMul", kind=TensorProto.BFLOAT16), tmp_path / "bfloat16.onnx")
    onnx.save(_model("Nobody", domain="com.microsoft"), tmp_path / "unknown.onnx")
    for file, phrase in (("bfloat16.onnx", "NOT_IMPLEMENTED"), ("unknown.onnx", "is not a registered function/op")):
        with pytest.raises(native_failures(), match=phrase) as caught:
            ort.InferenceSession(str(tmp_path / file))
        assert is_unsupported(caught.value), _ORT
        ort_check.check_opens(tmp_path / file, tmp_path / file)
