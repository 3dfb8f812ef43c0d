"""Adapters folded into the weights as a session starts."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from onnx_lora.errors import BindError, InputError, MissingDependencyError, PackageError, SelectionError
from onnx_lora.package import Package
from onnx_lora.points import StoredTensor, WeightPart, WholeWeight
from onnx_lora.roles import LinearWeight
from onnx_lora.runtime import AdapterSession, fold, merge
from onnx_lora.runtime.merge import InitializerEdit, LowRankEdit, NewWeight, fold_weight
from tests.runtime import tiny
from tests.runtime.conftest import CPU, contents, one_thread
from tests.support.numbers import assert_close, assert_same_bits

DATA = tiny.batch()
A, B = tiny.adapter("a", 1), tiny.adapter("b", 2, rank=5)


def logits(package, adapter, **options):
    session = fold(package, adapter, providers=CPU, sess_options=one_thread(), **options)
    return session.run(["logits"], DATA.feeds)[0]


def test_fold_equals_the_oracle_and_the_delta(package):
    session = AdapterSession(package, providers=CPU)
    session.load_adapter("a", A)
    assert_close(logits(package, A), tiny.oracle(DATA, (A, 1.0)))
    assert_close(logits(package, A), session.run(["logits"], DATA.feeds, adapter="a")[0])


def test_b_zero_folds_to_the_base_bit_for_bit(package):
    base = onnxruntime.InferenceSession(package.path / "base.onnx", one_thread(), providers=CPU)
    expected = base.run(["logits"], DATA.feeds)[0]
    assert_same_bits(logits(package, tiny.adapter("zero", 3, zero_b=True)), expected)


@pytest.mark.parametrize("modules", [["layer.q"], ["layer.k"], ["layer.up"], ["layer.q", "layer.k"]])
def test_modules_packed_in_one_initializer_are_folded_apart(package, modules):
    part = tiny.adapter("part", 4, modules=modules)
    assert_close(logits(package, part), tiny.oracle(DATA, (part, 1.0)))


def test_a_blend_as_pairs_folds_to_the_weighted_sum(package):
    assert_close(logits(package, [(A, 0.7), (B, -0.3)]), tiny.oracle(DATA, (A, 0.7), (B, -0.3)))


def test_replaced_weights_take_the_bases_place(package):
    own = tiny.adapter("own", 5, labels=3, norm=True)
    assert_close(logits(package, own), tiny.oracle(DATA, (own, 1.0)))


@pytest.mark.parametrize("labels", [1, 2, 7])
def test_a_head_of_another_width_folds(package, labels):
    own = tiny.adapter("own", 6, labels=labels)
    assert_close(logits(package, own), tiny.oracle(DATA, (own, 1.0)))


def test_a_head_of_another_width_without_onnx_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'onnx-lora\[fold\]'"):
        logits(package, tiny.adapter("own", 6, labels=7))


def test_float16_weights_are_folded_and_rounded_once(tmp_path):
    package = tiny.make_package(tmp_path / "p", dtype="float16")
    half = tiny.adapter("half", 1, dtype="float16")
    point = package.points["layer.up"]
    (edit,) = merge.plan_edits(
        package.graph(), replace(half, tensors={key: half.tensors[key] for key in (point.lora_a, point.lora_b)})
    )
    a, b = (half.tensors[key].astype(np.float64)[0] for key in (point.lora_a, point.lora_b))
    expected = (tiny.weights("float16")["W_up"].astype(np.float64) + (a @ b).T).astype(np.float16)
    assert_same_bits(fold_weight(edit, package), expected)


def test_float64_folds_as_the_oracle(tmp_path):
    package = tiny.make_package(tmp_path / "p", dtype="float64")
    wide, data = tiny.adapter("wide", 1, dtype="float64"), tiny.batch(dtype="float64")
    session = fold(package, wide, providers=CPU)
    expected = tiny.oracle(data, (wide, 1.0), dtype="float64")
    assert_close(session.run(["logits"], data.feeds)[0], expected, dtype="float64")


def test_blocks_cover_the_weight(package, monkeypatch):
    whole = [fold_weight(edit, package) for edit in merge.plan_edits(package.graph(), A)]
    monkeypatch.setattr(merge, "_BLOCK", 17)
    for actual, edit in zip(whole, merge.plan_edits(package.graph(), A), strict=True):
        assert_close(fold_weight(edit, package), actual)


def test_a_delta_goes_on_top_of_a_replacement(package):
    stored = package.points["layer.up"].parts[0].stored
    part = WeightPart("W_up", stored, stored.shape[0], transposed=True)
    weight = WholeWeight("layer.up.weight", LinearWeight(), stored.shape, "float32", False, True, "", (part,))
    value = np.ones((1, 12, 8), "f")
    a, b = np.full((12, 1), 2, "f"), np.full((1, 8), 3, "f")
    edit = InitializerEdit("W_up", stored, NewWeight(weight, part, value), (LowRankEdit("layer.up", part, a, b),))
    assert_same_bits(fold_weight(edit, package), np.full((8, 12), 7, "f"))


def test_a_weight_out_of_its_types_range_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p", dtype="float16")
    huge = {
        "layer.up.lora_A.weight": np.full((1, 12, 1), 300, np.float16),
        "layer.up.lora_B.weight": np.full((1, 1, 8), 300, np.float16),
    }
    with pytest.raises(BindError, match=r"layer\.up: the folded weight must fit float16"):
        fold(package, tiny.bound("huge", huge), providers=CPU)


def test_a_replacement_of_another_shape_is_refused(package):
    part = package.replaceable["norm.weight"].parts[0]
    edit = InitializerEdit(
        "norm", part.stored, NewWeight(package.replaceable["norm.weight"], part, np.ones(9, "f")), ()
    )
    with pytest.raises(BindError, match=r"norm\.weight must have the base's shape \[8\], and has \[9\]"):
        fold_weight(edit, package)


def test_a_delta_of_another_shape_than_its_weight_is_refused(package):
    part = WeightPart("W_up", package.points["layer.up"].parts[0].stored, 8, transposed=True)
    edit = InitializerEdit(
        "W_up", part.stored, None, (LowRankEdit("layer.up", part, np.ones((12, 1), "f"), np.ones((1, 9), "f")),)
    )
    with pytest.raises(BindError, match=r"layer\.up"):
        fold_weight(edit, package)


def test_the_values_live_as_long_as_the_session(package):
    session = fold(package, A, providers=CPU, sess_options=one_thread())
    first = session.run(["logits"], DATA.feeds)[0]
    for _ in range(20):
        fold(package, B, providers=CPU, sess_options=one_thread())
    gc.collect()
    assert_same_bits(session.run(["logits"], DATA.feeds)[0], first)


def test_session_options_may_be_used_again(package):
    options = one_thread()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    first = fold(package, A, providers=CPU, sess_options=options)
    second = fold(package, tiny.adapter("own", 6, labels=7), providers=CPU, sess_options=options)
    base = onnxruntime.InferenceSession(package.path / "base.onnx", options, providers=CPU)
    assert_close(first.run(None, DATA.feeds)[0], tiny.oracle(DATA, (A, 1.0)))
    assert second.run(None, DATA.feeds)[0].shape == (2, 7)
    assert_close(base.run(None, DATA.feeds)[0], tiny.oracle(DATA))
    for session in (first, second):
        assert session.get_session_options().intra_op_num_threads == 1
        assert session.get_session_options().get_session_config_entry("session.set_denormal_as_zero") == "1"


def test_files_the_options_ask_for_are_written_once_and_for_the_folded_graph(package, tmp_path):
    options = one_thread()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = fold(package, A, providers=CPU, sess_options=options)
    session.run(None, DATA.feeds)
    session.end_profiling()
    assert len(list(tmp_path.iterdir())) == 1
    assert options.enable_profiling


def test_options_with_providers_of_their_own_are_refused(package):
    options = one_thread()
    options.add_provider("CPUExecutionProvider", {})
    if not options.has_providers():
        pytest.skip("this ONNX Runtime does not count the CPU provider")
    with pytest.raises(InputError, match="providers="):
        fold(package, A, sess_options=options)


def test_options_must_be_onnx_runtimes(package):
    with pytest.raises(InputError, match="SessionOptions"):
        fold(package, A, sess_options={"intra_op_num_threads": 1})


def test_progress_counts_to_the_end(package):
    seen: list[tuple[int, int]] = []
    logits(package, A, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_the_base_keeps_its_bytes(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    before = contents(package.path)
    for adapter in (A, tiny.adapter("own", 6, labels=7, norm=True)):
        logits(package, adapter)
    assert contents(package.path) == before


def test_one_graph_of_several_is_folded(tmp_path):
    package = tiny.make_package(tmp_path / "p", graphs=("one", "two"))
    assert_close(logits(package, A, graph="two"), tiny.oracle(DATA, (A, 1.0)))
    with pytest.raises(PackageError, match="one, two"):
        logits(package, A)


@pytest.mark.parametrize("blend", [{}, [], [A], [(A,)], 3, None])
def test_what_is_no_blend_is_refused(package, blend):
    with pytest.raises(SelectionError):
        logits(package, blend)


@pytest.mark.parametrize("weight", [float("nan"), "1", None, True])
def test_a_weight_that_is_no_number_is_refused(package, weight):
    with pytest.raises(SelectionError, match="finite number"):
        logits(package, [(A, weight)])


def test_weights_that_cannot_be_read_are_named(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    point = package.points["layer.up"]
    away = StoredTensor("gone.data", 0, point.parts[0].stored.shape, "float32")
    moved = replace(point, parts=(replace(point.parts[0], stored=away),))
    graph = replace(package.graph(), points=(moved,))
    lost = Package(package.path, replace(package.manifest, graphs=(graph,)))
    with pytest.raises(PackageError, match=r"gone\.data"):
        fold(lost, tiny.adapter("up", 1, modules=["layer.up"]), providers=CPU)


def test_paths_may_be_strings(package):
    assert_close(logits(str(package.path), A), tiny.oracle(DATA, (A, 1.0)))
    assert isinstance(package.path, Path)
