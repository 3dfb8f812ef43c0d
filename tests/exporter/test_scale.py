"""Costs that grow with the number of points, not with its square."""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from benchmarks.points import make_chain
from onnx_lora import AdapterSession, Package
from onnx_lora.errors import InputError
from onnx_lora.exporter import attach

CPU = ["CPUExecutionProvider"]

# Ten times the points may cost so many times the CPU time: 10 if all is linear, 100 and more where one step is not.
_GENEROUS = 30


def attached(folder: Path, points: int) -> tuple[Package, float]:
    onnx.save(make_chain(points), str(folder / f"{points}.onnx"))
    start = time.process_time()
    package = attach(folder / f"{points}.onnx", folder / str(points))
    return package, time.process_time() - start


def started(package: Package) -> float:
    start = time.process_time()
    AdapterSession(package, providers=CPU)
    return time.process_time() - start


@pytest.mark.slow
def test_attach_and_start_do_not_take_the_square_of_the_points(tmp_path: Path) -> None:
    attached(tmp_path, 10)  # imports
    few, attach_few = attached(tmp_path, 150)
    many, attach_many = attached(tmp_path, 1500)
    assert attach_many < _GENEROUS * attach_few
    assert started(many) < _GENEROUS * max(started(few), 0.1)


def test_sessions_plan_no_reuse_and_leave_the_options_as_they_are(tmp_path: Path) -> None:
    package, _ = attached(tmp_path, 3)
    options = ort.SessionOptions()
    assert not AdapterSession(package, providers=CPU, sess_options=options).get_session_options().enable_mem_reuse
    assert options.enable_mem_reuse


def test_session_options_of_another_kind_are_refused(tmp_path: Path) -> None:
    package, _ = attached(tmp_path, 3)
    with pytest.raises(InputError, match="sess_options must be"):
        AdapterSession(package, providers=CPU, sess_options={"enable_mem_reuse": True})


def test_a_delta_says_its_shape_where_the_file_said_none(tmp_path: Path) -> None:
    package, _ = attached(tmp_path, 3)
    graph = onnx.load(str(package.path / "model.onnx"), load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    ends = [name for node in graph.node if node.name.endswith("lora_add") for name in [*node.input, *node.output]]
    assert len(ends) == 9
    assert {tuple(shapes[name]) for name in ends} == {("batch", "tokens", 8)}
