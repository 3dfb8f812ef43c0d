"""Which files of a model's folder come along into a package, and which are never opened."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lora import AdapterSession, Package, fold_to
from onnx_lora.errors import ModelError, PackageError
from onnx_lora.exporter import attach, export
from tests.runtime import tiny

X = np.arange(128, dtype=np.float32).reshape(2, 64) / 100


def _model(folder: Path, data: str = "weights.bin") -> Path:
    """One linear module, its weight in the file `data`."""
    folder.mkdir(parents=True)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="/fc/MatMul")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(weight, "fc.weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location=data, size_threshold=0)
    (folder / "config.json").write_text("{}")
    return folder


def _answer(package: Package) -> np.ndarray:
    return np.asarray(AdapterSession(package).run(None, {"x": X})[0])


@pytest.mark.parametrize("data", ["base.onnx", "onnx_lora.json", "model.onnx.data", "BASE.ONNX", "Model.Onnx"])
def test_a_data_file_named_like_one_of_ours_stays_whole(tmp_path: Path, data: str) -> None:
    plain = attach(_model(tmp_path / "plain"), tmp_path / "expected")
    package = attach(_model(tmp_path / "in", data) / "model.onnx", tmp_path / "out")
    np.testing.assert_array_equal(_answer(package), _answer(plain))
    names = [entry.name.casefold() for entry in package.path.iterdir()]
    assert len(set(names)) == len(names)


def test_a_companion_that_leads_out_is_refused_by_name(tmp_path: Path) -> None:
    folder = _model(tmp_path / "in")
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"tokenizer\.json → .*secret"):
        attach(folder, tmp_path / "out")


def test_a_link_within_the_folder_comes_along_as_a_file(tmp_path: Path) -> None:
    folder = _model(tmp_path / "in")
    (folder / "tokenizer.json").symlink_to("config.json")
    package = attach(folder, tmp_path / "out")
    assert not (package.path / "tokenizer.json").is_symlink()


def _in_cache(folder: Path, model: Path) -> Path:
    """The files of `model` as the hub's cache keeps them: links of a snapshot to blobs."""
    snapshot, blobs = folder / "models--x" / "snapshots" / "abc", folder / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / f"sha{index}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"sha{index}", snapshot))
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_one_folder_with_its_blobs(tmp_path: Path) -> None:
    expected = attach(_model(tmp_path / "plain"), tmp_path / "expected")
    package = attach(_in_cache(tmp_path / "cache", _model(tmp_path / "in")), tmp_path / "out")
    np.testing.assert_array_equal(_answer(package), _answer(expected))
    assert (package.path / "config.json").read_text() == "{}"
    assert not any(entry.is_symlink() for entry in package.path.iterdir())


def test_a_blob_that_leads_out_is_refused(tmp_path: Path) -> None:
    snapshot = _in_cache(tmp_path / "cache", _model(tmp_path / "in"))
    (tmp_path / "secret").write_text("{}")
    (snapshot.parent.parent / "blobs" / "sha9").symlink_to(tmp_path / "secret")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/sha9")
    with pytest.raises(ModelError, match="secret"):
        attach(snapshot, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "genai_config.json"])
def test_a_pipe_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    folder = _model(tmp_path / "in")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=name):
        attach(folder, tmp_path / "out")
    with pytest.raises(ModelError):
        export(folder, tmp_path / "out")
    with pytest.raises(ModelError, match=name):
        attach(_model(tmp_path / "other"), tmp_path / "out", checkpoint=folder)


def test_a_device_of_a_package_is_refused(tmp_path: Path) -> None:
    package = attach(_model(tmp_path / "in"), tmp_path / "out")
    (package.path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(PackageError, match=r"tokenizer\.json"):
        Package.open(package.path)


def test_a_fold_copies_no_link_that_leads_out_and_overwrites_nothing(tmp_path: Path) -> None:
    package = tiny.make_package(tmp_path / "package", graphs=("a", "b"))
    (tmp_path / "secret").write_text("secret")
    (package.path / "note").symlink_to(tmp_path / "secret")
    with pytest.raises(PackageError, match="link out of its folder"):
        fold_to(package, tiny.adapter("a", 1), tmp_path / "out")
    (package.path / "note").unlink()
    (package.path / "model.onnx").write_text("a user's own")
    with pytest.raises(PackageError, match="rename it"):
        fold_to(package, tiny.adapter("a", 1), tmp_path / "out", graph="a")


def test_a_constant_in_a_node_does_not_reach_out_of_the_folder(tmp_path: Path) -> None:
    folder = _model(tmp_path / "in")
    (tmp_path / "secret").write_bytes(bytes(256))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = onnx.TensorProto(name="c", dims=[64], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    model.graph.node[0].output[0] = "z"
    model.graph.node.extend([constant, helper.make_node("Add", ["z", "c"], ["y"])])
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ModelError):
        attach(folder, tmp_path / "out")


def test_a_pipe_that_concerns_nobody_is_in_nobodys_way(tmp_path: Path) -> None:
    file = _model(tmp_path / "in") / "model.onnx"
    (tmp_path / "in" / "others").mkdir()
    os.mkfifo(tmp_path / "in" / "others" / "config.json")
    os.mkfifo(tmp_path / "in" / "agent.socket")
    assert attach(file, tmp_path / "out").points
