"""A float package quantized, its adapters unchanged; and folding into quantized weights, with leave and measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from onnx_lora import AdapterSession, Package, bind, fold, fold_to, read_adapter, write_bound
from onnx_lora.cli import cli
from onnx_lora.errors import BindError, ModelError
from onnx_lora.exporter.quantization import Method, quantize
from onnx_lora.points import Array
from onnx_lora.runtime import Requantize
from tests.support.json_schema import check_result
from tests.support.models import make_adapter, make_model
from tests.support.numbers import assert_close, assert_same_bits

METHODS = {"int4": Method(block_size=16, accuracy_level=0), "int8": Method(bits=8, block_size=16, accuracy_level=0)}
METHODS["dynamic"] = Method("dynamic", bits=8)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return make_adapter(make_model("bert"), folder / "it", r=3, lora_alpha=1, target_modules="all-linear")


@pytest.fixture(scope="module")
def quantized(
    packages: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Package, Package]]:
    made: dict[str, Package] = {}

    def make(method: str) -> tuple[Package, Package]:
        if method not in made:
            made[method] = quantize(packages("bert"), tmp_path_factory.mktemp("q") / method, method=METHODS[method])
        return Package.open(packages("bert")), made[method]

    return make


def _feeds() -> dict[str, Array]:
    ids = np.arange(12).reshape(2, 6) % 90
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize("method", METHODS)
def test_points_heads_and_digests_are_those_of_the_float_package(
    quantized: Callable[[str], tuple[Package, Package]], method: str
) -> None:
    source, package = quantized(method)
    assert list(package.points) == list(source.points)
    assert package.fingerprint == source.fingerprint
    assert {name: weight.shape for name, weight in package.replaceable.items()} == {
        name: weight.shape for name, weight in source.replaceable.items()
    }
    assert all(point.is_quantized for point in package.points.values())
    assert not any(part.quantized for weight in package.replaceable.values() for part in weight.parts)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_the_float_package_fits_and_acts(
    quantized: Callable[[str], tuple[Package, Package]], method: str, adapter: Path, tmp_path: Path
) -> None:
    source, package = quantized(method)
    file = write_bound(bind(read_adapter(adapter), source), tmp_path / "it.safetensors")
    session, reference = AdapterSession(package), AdapterSession(source)
    for each in (session, reference):
        each.load_adapter("it", file)
    wanted, got = (each.run(None, _feeds(), adapter="it")[0] for each in (reference, session))
    assert np.linalg.norm(got - wanted) < 0.25 * np.linalg.norm(wanted)
    if method == "dynamic":
        return  # its activations share one range over the batch: rows are not independent in the base either
    mixed = session.run(None, _feeds(), adapter=["it", None])[0]
    assert_close(mixed[0], got[0])
    assert_close(mixed[1], session.run(None, _feeds())[0][1])


def test_folding_into_quantized_weights_needs_leave(
    quantized: Callable[[str], tuple[Package, Package]], adapter: Path, tmp_path: Path
) -> None:
    _, package = quantized("int4")
    with pytest.raises(BindError, match=r"quantized, and folding would round it again.*`requantize="):
        fold(package, adapter)
    with pytest.raises(BindError, match="`requantize="):
        fold_to(package, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("with_source", [True, False])
def test_a_requantized_fold_computes_with_the_rounded_sum(
    quantized: Callable[[str], tuple[Package, Package]], method: str, adapter: Path, tmp_path: Path, with_source: bool
) -> None:
    source, package = quantized(method)
    bound = bind(read_adapter(adapter), package)
    leave = Requantize(source if with_source else None)
    folded = fold(package, bound, requantize=leave).run(None, _feeds())[0]
    assert leave.rounding.keys() == set(bound.coverage.applied)
    limit = 0.2 if method == "int4" else 0.05
    assert all(0 < entry.of_weight < limit for entry in leave.rounding.values())
    exact = AdapterSession(source)
    exact.load_adapter("it", bind(read_adapter(adapter), source))
    wanted = exact.run(None, _feeds(), adapter="it")[0]
    assert np.linalg.norm(folded - wanted) < (0.35 if method == "int4" else 0.1) * np.linalg.norm(wanted)
    written = fold_to(package, bound, tmp_path / "out", requantize=Requantize(leave.source))
    assert_same_bits(onnxruntime.InferenceSession(written / "model.onnx").run(None, _feeds())[0], folded)


def test_outputs_that_no_adapter_touches_keep_their_bits(
    quantized: Callable[[str], tuple[Package, Package]], tmp_path: Path
) -> None:
    _, package = quantized("int4")
    name = "bert.encoder.layer.0.attention.self.query"
    only = make_adapter(make_model("bert"), tmp_path / "q", r=2, target_modules=[name], modules_to_save=["classifier"])
    written = fold_to(package, only, tmp_path / "out", requantize=Requantize())
    before, after = (
        {
            value.name: onnx.numpy_helper.to_array(value, str(folder))
            for value in onnx.load(folder / file).graph.initializer
        }
        for folder, file in ((package.path, package.graph().base_file), (written, "model.onnx"))
    )
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    part = package.points[name].parts[0]
    replaced = {part.initializer for weight in package.replaceable.values() for part in weight.parts}
    assert part.quantized is not None
    assert changed - replaced == {part.initializer, part.quantized.scale.initializer}


def test_the_source_of_another_base_is_refused(
    quantized: Callable[[str], tuple[Package, Package]], adapter: Path, packages: Callable[[str], Path]
) -> None:
    _, package = quantized("int4")
    with pytest.raises(BindError, match="the float package that this one was made from"):
        fold(package, adapter, requantize=Requantize(Package.open(packages("roberta"))))


def test_what_cannot_be_quantized_is_refused(
    quantized: Callable[[str], tuple[Package, Package]], tmp_path: Path
) -> None:
    _, package = quantized("int4")
    with pytest.raises(ModelError, match="quantized already"):
        quantize(package, tmp_path / "out")
    for wrong in ({"bits": 5}, {"kind": "dynamic", "bits": 4}, {"block_size": 20}, {"accuracy_level": 9}):
        with pytest.raises(ModelError):
            Method(**wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_language_models_keep_all_their_points(packages: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    source = Package.open(packages(name))
    package = quantize(source, tmp_path / "out", method=METHODS["int4"])
    assert list(package.points) == list(source.points)
    assert [graph.untargeted for graph in package.manifest.graphs] == [
        graph.untargeted for graph in source.manifest.graphs
    ]


def test_the_commands_say_what_rounding_cost(packages: Callable[[str], Path], adapter: Path, tmp_path: Path) -> None:
    source, out = str(packages("bert")), str(tmp_path / "q")
    run = CliRunner().invoke(cli, ["quantize", source, out, "--bits", "8", "--json"], catch_exceptions=False)
    check_result("quantize", json.loads(run.stdout))
    assert json.loads(run.stdout)["points"] > 0
    arguments = ["fold", out, str(tmp_path / "f"), "--adapter", str(adapter), "--requantize", "--source", source]
    facts = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert 0 < max(entry["error_of_weight"] for entry in facts["rounding"]) < 0.05
    assert CliRunner().invoke(cli, ["fold", out, "x", "--adapter", "y", "--source", source]).exit_code == 2
