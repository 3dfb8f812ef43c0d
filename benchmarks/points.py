"""What many points cost: attaching, opening, and starting a session, as their number grows.

Regime: a chain of linear modules of 8 features with a bias and a Tanh each, so small that nothing but the graph
counts; CPU seconds of one process, each size in turn. The graph without points is the baseline (`base`): ONNX Runtime
itself takes more than its share of time for a longer graph, and a point adds three nodes to the three there are, and
two inputs, among which ONNX Runtime looks for each initializer. `trial`: ONNX Runtime opening the graph that was made,
which is the last step of `attach`. `plain session`: an InferenceSession of ONNX Runtime's own on the graph with
points, which plans its memory ahead; that takes the square of their number, and is left out above `_PLANNED`.

    python -m benchmarks.points        prints JSON and writes results/points.json
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from benchmarks.timing import machine
from onnx_lora import AdapterSession, Package
from onnx_lora.exporter import attach
from onnx_lora.exporter.ort_check import check_opens

_SIZES = (100, 1000, 10_000)
_PLANNED = 1000  # points: 10,000 would take minutes
_WIDTH = 8  # features
_LAYER = 7  # modules in each


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "points.json")
def main(out: Path) -> None:
    """Measure, print, and write the results."""
    results = measure()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(json.dumps(results, indent=1))


def measure() -> dict[str, Any]:
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="onnx-lora-bench.") as scratch:
        _of_size(Path(scratch) / "warm-up", 10)  # what is imported late
        for size in _SIZES:
            seconds[str(size)] = _of_size(Path(scratch) / str(size), size)
    growth = {
        f"{few} to {many}": {name: seconds[many][name] / seconds[few][name] for name in seconds[many]}
        for few, many in zip(list(seconds), list(seconds)[1:], strict=False)
    }
    return {
        "machine": machine(1),
        "CPU seconds": seconds,
        "growth": growth,
        "session / base": {size: measured["session"] / measured["base"] for size, measured in seconds.items()},
    }


def _of_size(folder: Path, points: int) -> dict[str, float]:
    folder.mkdir()
    source, out = folder / "chain.onnx", folder / "package"
    onnx.save(make_chain(points), str(source))
    seconds = {
        "attach": _cpu(lambda: attach(source, out)),
        "trial": _cpu(lambda: check_opens(out / "model.onnx", source)),
    }
    seconds["attach but for the trial"] = seconds["attach"] - seconds["trial"]
    seconds["open"] = _cpu(lambda: Package.open(out))
    seconds["session"] = _cpu(lambda: AdapterSession(out, sess_options=_options(), providers=["CPUExecutionProvider"]))
    seconds["base"] = _cpu(lambda: _plain(out / "base.onnx"))
    if points <= _PLANNED:
        seconds["plain session"] = _cpu(lambda: _plain(out / "model.onnx"))
    return seconds


def _cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _plain(file: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(file), _options(), providers=["CPUExecutionProvider"])


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def make_chain(points: int) -> onnx.ModelProto:
    """`x = Tanh(x · W + b)`, once for each point, named as TorchScript's exporter names modules."""
    generator = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    value = "x"
    for index in range(points):
        path = f"model/layers.{index // _LAYER}/block/part{index % _LAYER}"
        module = path.replace("/", ".")
        matrix = generator.standard_normal((_WIDTH, _WIDTH)).astype(np.float32)
        bias = generator.standard_normal(_WIDTH).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"onnx::MatMul_{index}"))
        weights.append(numpy_helper.from_array(bias, f"{module}.bias"))
        nodes += [
            helper.make_node("MatMul", [value, f"onnx::MatMul_{index}"], [f"/{path}/m"], name=f"/{path}/MatMul"),
            helper.make_node("Add", [f"{module}.bias", f"/{path}/m"], [f"/{path}/a"], name=f"/{path}/Add"),
            helper.make_node("Tanh", [f"/{path}/a"], [f"/{path}/t"], name=f"/{path}/Tanh"),
        ]
        value = f"/{path}/t"
    nodes.append(helper.make_node("Identity", [value], ["y"], name="/Identity"))
    ends = [helper.make_tensor_value_info(name, 1, ["batch", "tokens", _WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    main()
