"""Adapters folded into a model folder of its own."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest

from onnx_lora.errors import InputError, MissingDependencyError, OutputExistsError, PackageError, StorageError
from onnx_lora.runtime import fold, fold_to, standalone
from tests.runtime import tiny
from tests.runtime.conftest import CPU, one_thread
from tests.support.numbers import assert_close, assert_same_bits

DATA = tiny.batch()
A = tiny.adapter("a", 1)


def run(file: Path):
    return onnxruntime.InferenceSession(file, one_thread(), providers=CPU).run(None, DATA.feeds)[0]


def places(folder: Path) -> dict[str, int]:
    """Where each initializer begins in the data file."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {
        tensor.name: int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    }


@pytest.mark.parametrize("labels", [0, 3, 7])
def test_it_loads_in_plain_onnxruntime_and_equals_fold(package, tmp_path, labels):
    adapter = tiny.adapter("own", 5, labels=labels, norm=True)
    out = fold_to(package, adapter, tmp_path / "out")
    expected = fold(package, adapter, providers=CPU, sess_options=one_thread()).run(None, DATA.feeds)[0]
    assert_same_bits(run(out / "model.onnx"), expected)
    assert_close(run(out / "model.onnx"), tiny.oracle(DATA, (adapter, 1.0)))
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)


def test_a_blend_equals_the_weighted_sum(package, tmp_path):
    b = tiny.adapter("b", 2, rank=5)
    out = fold_to(package, [(A, 0.5), (b, 2)], tmp_path / "out")
    assert_close(run(out / "model.onnx"), tiny.oracle(DATA, (A, 0.5), (b, 2.0)))


def test_the_folder_holds_a_model_and_what_came_with_it(package, tmp_path):
    out = fold_to(package, A, tmp_path / "deep" / "out")
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    assert names == ["config.json", "extra", "extra/note.txt", "model.onnx", "model.onnx.data", "tokenizer.json"]
    assert (out / "config.json").read_bytes() == (package.path / "config.json").read_bytes()


def test_tensors_are_aligned(package, tmp_path):
    out = fold_to(package, A, tmp_path / "out")
    offsets = list(places(out).values())
    assert len(offsets) == 5
    assert all(offset % 64 == 0 for offset in offsets)


def test_large_tensors_begin_at_a_page():
    data = standalone._Data(io.BytesIO())
    data.put("small", 3, lambda file: file.write(b"abc"))
    offset, _ = data.put("large", 2**20 + 1, lambda file: file.write(bytes(2**20 + 1)))
    assert offset == 4096


def test_graphs_of_one_package_share_their_weights(tmp_path):
    package = tiny.make_package(tmp_path / "p", graphs=("one", "two"))
    out = fold_to(package, A, tmp_path / "out")
    single = fold_to(package, A, tmp_path / "single", graph="one")
    assert (out / "model.onnx.data").read_bytes() == (single / "model.onnx.data").read_bytes()
    assert sorted(path.name for path in out.glob("*.onnx")) == ["one.onnx", "two.onnx"]
    for name in ("one.onnx", "two.onnx"):
        assert_same_bits(run(out / name), run(single / "model.onnx"))


def test_tied_weights_are_shared_where_they_are_not_folded(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    file = package.path / "base.onnx"
    model = onnx.load(file, load_external_data=False)
    twin = model.graph.initializer.add()
    twin.CopyFrom(next(tensor for tensor in model.graph.initializer if tensor.name == "W_up"))
    twin.name = "W_tied"
    model.graph.node.add(op_type="Identity", input=["W_tied"], output=["tied"])
    model.graph.output.add().CopyFrom(onnx.helper.make_tensor_value_info("tied", 1, [8, 12]))
    onnx.save(model, file)
    whole = fold_to(package, tiny.adapter("zero", 1, zero_b=True), tmp_path / "shared")
    apart = fold_to(package, A, tmp_path / "apart")
    assert places(whole)["W_up"] == places(whole)["W_tied"]
    assert places(apart)["W_up"] != places(apart)["W_tied"]
    session = onnxruntime.InferenceSession(apart / "model.onnx", one_thread(), providers=CPU)
    assert_same_bits(session.run(["tied"], DATA.feeds)[0], tiny.weights()["W_up"])


def test_a_head_of_another_width_takes_its_labels_along(package, tmp_path, caplog):
    out = fold_to(package, tiny.adapter("own", 5, labels=7), tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == {"dim": 8, "num_labels": 7}
    assert "labels were removed" in caplog.text


def test_a_head_of_the_same_width_keeps_the_labels(package, tmp_path):
    out = fold_to(package, tiny.adapter("own", 5, labels=3), tmp_path / "out")
    assert (out / "config.json").read_bytes() == (package.path / "config.json").read_bytes()


def test_a_config_that_is_no_json_is_refused_when_it_must_change(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    (package.path / "config.json").write_text("{")
    with pytest.raises(PackageError, match=r"config\.json"):
        fold_to(package, tiny.adapter("own", 5, labels=7), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_package_without_a_config_needs_none(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    (package.path / "config.json").unlink()
    out = fold_to(package, tiny.adapter("own", 5, labels=7), tmp_path / "out")
    assert run(out / "model.onnx").shape == (2, 7)


def test_an_output_that_exists_is_left_alone(package, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(OutputExistsError):
        fold_to(package, A, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing_behind(package, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(standalone, "_copy_companions", full)
    with pytest.raises(StorageError, match="the disk is full"):
        fold_to(package, A, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_disk_is_named(package, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    opened = Path.open

    def to_full(self: Path, *args: object, **kwargs: object) -> object:
        return opened(Path("/dev/full") if self.name == "model.onnx.data" and "wb" in args else self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", to_full)
    with pytest.raises(StorageError, match="the disk is full"):
        fold_to(package, A, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_data_file_cut_off_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    file = package.path / "model.onnx.data"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(PackageError, match="cut off"):
        fold_to(package, A, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_graph_with_its_weights_inside_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    onnx.save(onnx.load(package.path / "base.onnx"), package.path / "base.onnx")
    with pytest.raises(PackageError, match=r"W_qk must be .*, and is not in a file"):
        fold_to(package, A, tmp_path / "out")


def test_without_onnx_it_says_what_to_install(package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'onnx-lora\[fold\]'"):
        fold_to(package, A, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_to_the_end(package, tmp_path):
    seen: list[tuple[int, int]] = []
    fold_to(package, A, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_base_graph_that_disagrees_with_the_manifest_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    model = onnx.load(package.path / "base.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "W_qk")
    next(entry for entry in tensor.external_data if entry.key == "offset").value = "64"
    onnx.save(model, package.path / "base.onnx")
    with pytest.raises(PackageError, match=r"W_qk must be .* from 0 of .*, and is .* from 64 of "):
        fold_to(package, A, tmp_path / "out")


@pytest.mark.parametrize("key, value", [("location", "../secret"), ("location", ""), ("offset", "-8"), ("length", "x")])
def test_a_weight_outside_the_package_is_refused(tmp_path, key, value):
    package = tiny.make_package(tmp_path / "p")
    model = onnx.load(package.path / "base.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "norm")
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    onnx.save(model, package.path / "base.onnx")
    with pytest.raises(PackageError, match="norm must say where"):
        fold_to(package, A, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["out", "extra/out"])
def test_an_output_inside_the_package_is_refused(tmp_path, inside):
    package = tiny.make_package(tmp_path / "p")
    with pytest.raises(InputError, match="inside the package"):
        fold_to(package, A, package.path / inside)


def test_a_config_that_is_no_object_is_refused_when_it_must_change(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    (package.path / "config.json").write_text("[]")
    with pytest.raises(PackageError, match="JSON object"):
        fold_to(package, tiny.adapter("own", 5, labels=7), tmp_path / "out")
