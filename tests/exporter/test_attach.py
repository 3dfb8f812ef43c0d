"""Attaching points to somebody's file: what it keeps, what it refuses, and that nothing is left half done."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from onnx_lora import Package
from onnx_lora.errors import ModelError, OutputExistsError, PackageError, StorageError
from onnx_lora.exporter import attach
from tests.support.graphs import random, save

node = helper.make_node
Make = Callable[[str], Path]


def _model(folder: Path, *, external: bool = False) -> Path:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="/layers.0/q_proj/MatMul"),
        node("Add", ["h", "layers.0.q_proj.bias"], ["hb"]),
        node("MatMul", ["hb", "v"], ["y"], name="/classifier/MatMul"),
    ]
    weights = {"w": random(8, 6), "v": random(6, 3), "layers.0.q_proj.bias": random(6)}
    return save(
        folder / "model.onnx",
        nodes,
        weights,
        inputs={"x": ["batch", "seq", 8]},
        outputs={"y": ["batch", "seq", 3]},
        external=external,
    )


def test_names_alone_give_the_modules_that_torch_gives(packages: Make, tmp_path: Path) -> None:
    exported = Package.open(packages("llama"))
    attached = attach(exported.path / exported.graph().base_file, tmp_path / "out")
    assert attached.points.keys() == exported.points.keys()
    assert attached.fingerprint == exported.fingerprint


def test_a_checkpoint_gives_the_modules_their_whole_names(packages: Make, checkpoints: Make, tmp_path: Path) -> None:
    """T5's encoder is exported alone: its nodes say block.0, the checkpoint says encoder.block.0."""
    exported = Package.open(packages("t5"))
    file = exported.path / exported.graph("encoder_model").base_file
    attached = attach(file, tmp_path / "out", checkpoint=checkpoints("t5"))
    assert attached.points.keys() == {point.module for point in exported.graph("encoder_model").points}


def test_external_data_is_kept_as_it_is(tmp_path: Path) -> None:
    file = _model(tmp_path / "in", external=True)
    data = file.with_name("model.onnx.data")
    before = data.read_bytes(), file.read_bytes()
    package = attach(file, tmp_path / "out")
    assert (package.path / "model.onnx.data").read_bytes() == before[0]
    assert (data.read_bytes(), file.read_bytes()) == before
    onnx.load(file)  # onnx refuses a data file with a second hard link
    onnx.load(package.path / "model.onnx")


def test_weights_are_written_once_for_both_graphs(tmp_path: Path) -> None:
    package = attach(_model(tmp_path), tmp_path / "out")
    graphs = [onnx.load(package.path / name, load_external_data=False) for name in ("base.onnx", "model.onnx")]
    places = [
        {
            entry.value
            for tensor in graph.graph.initializer
            for entry in tensor.external_data
            if tensor.name == "w" and entry.key in ("location", "offset")
        }
        for graph in graphs
    ]
    assert places[0] == places[1] != set()


def test_the_head_may_have_another_number_of_outputs(tmp_path: Path) -> None:
    package = attach(_model(tmp_path), tmp_path / "out")
    head = package.replaceable["classifier.weight"]
    assert (head.shape, head.free_outputs, head.per_row) == ((3, 6), True, True)
    assert head.fits((7, 6))
    assert not head.fits((7, 5))


@pytest.mark.parametrize("word", ["heads", ["heads"], ["heads", "q_proj"]], ids=str)
def test_heads_is_a_word_alone_and_among_names(tmp_path: Path, word: str | list[str]) -> None:
    package = attach(_model(tmp_path), tmp_path / "out", replaceable=word)
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in package.replaceable}
    assert modules == {"classifier", *word} - {"heads"} if isinstance(word, list) else {"classifier"}


def test_companions_come_along(tmp_path: Path) -> None:
    file = _model(tmp_path / "in")
    (file.parent / "config.json").write_text('{"model_type": "mine"}')
    (file.parent / "notes.pdf").write_text("not part of a model")
    package = attach(file, tmp_path / "out")
    assert json.loads((package.path / "config.json").read_text())["model_type"] == "mine"
    assert not (package.path / "notes.pdf").exists()


def test_a_package_can_be_moved(tmp_path: Path) -> None:
    package = attach(_model(tmp_path / "in"), tmp_path / "out")
    moved = package.path.rename(tmp_path / "elsewhere")
    assert Package.open(moved).fingerprint == package.fingerprint
    assert str(tmp_path) not in (moved / "onnx_lora.json").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": ["q_prj"]}, r"'q_prj' names no module; close: q_proj"),
        ({"targets": []}, r"targets must name modules"),
        ({"targets": "layers.*k_proj"}, r"matches none; there are classifier, q_proj"),
        ({"targets": "q_proj("}, r"must be a regular expression"),
        ({"replaceable": ["pooler"]}, r"pooler: nothing of that name"),
        ({"default_rank": 2}, r"default_rank must be 0 or 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        attach(_model(tmp_path), tmp_path / "out", **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_files_that_are_no_graphs_are_refused(tmp_path: Path) -> None:
    model = _model(tmp_path / "in").read_bytes()
    for name, content in {"empty": b"", "text": b"hello", "cut": model[: len(model) // 2]}.items():
        file = tmp_path / f"{name}.onnx"
        file.write_bytes(content)
        with pytest.raises(ModelError, match=name):
            attach(file, tmp_path / "out")
    with pytest.raises(ModelError, match="no such file"):
        attach(tmp_path / "absent.onnx", tmp_path / "out")
    (tmp_path / "void").mkdir()
    with pytest.raises(ModelError, match="has none"):
        attach(tmp_path / "void", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_short_and_straying_data_files_are_refused(tmp_path: Path) -> None:
    file = _model(tmp_path / "in", external=True)
    data = file.with_name("model.onnx.data")
    content = data.read_bytes()
    data.write_bytes(content[:-4])
    with pytest.raises(ModelError, match="was cut off"):
        attach(file, tmp_path / "out")
    data.unlink()
    with pytest.raises(ModelError, match="is missing"):
        attach(file, tmp_path / "out")
    (tmp_path / "model.onnx.data").write_bytes(content)
    proto = onnx.load(file, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="must lie in the model's folder"):
        attach(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_with_points_gets_no_second_ones(tmp_path: Path) -> None:
    package = attach(_model(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(ModelError, match="start from a graph of the plain base model"):
        attach(package.path / "model.onnx", tmp_path / "again")


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        attach(_model(tmp_path / "in"), out)
    assert (out / "precious").read_text() == "mine"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interrupt_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    file = _model(tmp_path / "in")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("onnx_lora.exporter.writing.weight_files.WeightStore._write", fail)
    expected = StorageError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        attach(file, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_broken_packages_are_refused(tmp_path: Path) -> None:
    package = attach(_model(tmp_path / "in"), tmp_path / "out")
    manifest = package.path / "onnx_lora.json"
    whole = json.loads(manifest.read_text())

    def refused(content: str | None, message: str) -> None:
        if content is None:
            manifest.unlink()
        else:
            manifest.write_text(content)
        with pytest.raises(PackageError, match=message):
            Package.open(package.path)

    refused(json.dumps(whole | {"format_version": 99, "minimum_reader": 99}), "upgrade onnx-lora")
    refused(json.dumps(whole | {"graphs": []}), "names no graph")
    refused(json.dumps({key: whole[key] for key in whole if key != "graphs"}), "lacks graphs")
    refused(json.dumps(whole | {"producer": 7}), "producer must be str")
    refused("[1]", "must be a JSON object")
    nowhere = whole["graphs"][0] | {"file": "\ud800.onnx"}
    refused(json.dumps(whole | {"graphs": [nowhere]}), "surrogates not allowed")
    refused("{", "must be JSON, and is damaged")
    stray = json.loads(json.dumps(whole))
    stray["graphs"][0]["file"] = "../model.onnx"
    refused(json.dumps(stray), "must lie in the package folder itself")
    shifted = json.loads(json.dumps(whole))
    shifted["graphs"][0]["points"][0]["parts"][0]["stored"]["offset"] = 10**6
    refused(json.dumps(shifted), "it was cut off")
    refused(None, "not a package, or only half of one")
    manifest.write_text(json.dumps(whole))
    (package.path / "model.onnx.data").unlink()
    with pytest.raises(PackageError, match=r"model.onnx.data is missing"):
        Package.open(package.path)


@pytest.mark.parametrize("fused", ["name", "rule"])
def test_a_convolution_that_may_hold_a_batch_norm_gets_no_point(tmp_path: Path, fused: str) -> None:
    """PEFT's change goes in before the norm, and would miss its factor."""
    name = "onnx::Conv_25" if fused == "name" else "conv.weight"
    conv = helper.make_node("Conv", ["x", name], ["h"], name="/conv/Conv")
    if fused == "rule":
        entry = conv.metadata_props.add()
        entry.key, entry.value = "pkg.onnxscript.rewriter.rule_name", "FuseBatchNormIntoConv"
    nodes = [conv, helper.make_node("Conv", ["h", "plain.weight"], ["y"], name="/plain/Conv")]
    weights = {name: random(4, 3, 1, 1), "plain.weight": random(2, 4, 1, 1)}
    shapes = {"inputs": {"x": ["batch", 3, 5, 5]}, "outputs": {"y": ["batch", 2, 5, 5]}}
    package = attach(save(tmp_path / "m.onnx", nodes, weights, **shapes), tmp_path / "out", targets="all")
    assert set(package.points) == {"plain"}
    (stray,) = package.graph().unplaced
    assert "batch norm" in stray.reason
