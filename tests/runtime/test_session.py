"""What a call computes with the adapter it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_lora.errors import AdapterFileError, BindError, InputError, PackageError, SelectionError
from onnx_lora.package import Package
from onnx_lora.runtime import AdapterSession
from tests.runtime import tiny
from tests.runtime.conftest import CPU, one_thread, open_session
from tests.support.numbers import assert_close, assert_same_bits

DATA = tiny.batch()


def logits(session, adapter=None, data=DATA):
    return session.run(["logits"], data.feeds, adapter=adapter)[0]


def plain_base(package: Package):
    return onnxruntime.InferenceSession(package.path / "base.onnx", one_thread(), providers=CPU)


def test_without_an_adapter_it_is_the_base_graph_bit_for_bit(package, session):
    expected = plain_base(package).run(None, DATA.feeds)
    for actual, wanted in zip(session.run(None, DATA.feeds), expected, strict=True):
        assert_close(actual, wanted)
    assert_same_bits(session.run(["up_all"], DATA.feeds)[0], plain_base(package).run(["up"], DATA.feeds)[0])


def test_one_adapter_equals_the_oracle(session):
    assert_close(logits(session, "a"), tiny.oracle(DATA, (tiny.adapter("a", 1), 1.0)))


def test_b_zero_equals_the_base_bit_for_bit(session):
    session.load_adapter("zero", tiny.adapter("zero", 3, zero_b=True))
    assert_same_bits(logits(session, "zero"), logits(session))


def test_a_then_b_then_a_gives_the_first_again_bit_for_bit(session):
    first = logits(session, "a")
    assert not np.allclose(logits(session, "b"), first)
    assert_same_bits(logits(session, "a"), first)


def test_after_adapters_the_base_is_what_it_was(package):
    session = AdapterSession(package, providers=CPU)
    before = logits(session)
    session.load_adapter("a", tiny.adapter("a", 1))
    logits(session, ["a", None])
    session.unload_adapter("a")
    assert_same_bits(logits(session), before)


def test_a_blend_equals_the_weighted_sum(session):
    expected = tiny.oracle(DATA, (tiny.adapter("a", 1), 0.7), (tiny.adapter("b", 2, rank=5), -0.3))
    assert_close(logits(session, {"a": 0.7, "b": -0.3}), expected)


def test_the_order_of_a_blend_does_not_matter_bit_for_bit(session):
    fresh = open_session(session.package)
    assert_same_bits(logits(session, {"a": 0.7, "b": 0.3}), logits(fresh, {"b": 0.3, "a": 0.7}))


def test_a_blend_of_one_at_full_strength_is_that_adapter(session):
    assert_same_bits(logits(session, {"a": 1}), logits(session, "a"))


def test_a_weight_may_be_numpys(session):
    assert_same_bits(logits(session, {"a": np.float32(0.5)}), logits(session, {"a": 0.5}))


def test_rows_equal_runs_of_their_own(session):
    data = tiny.batch(rows=4)
    rows = ["a", None, {"a": 0.5, "b": 0.5}, "b"]
    mixed = logits(session, rows, data)
    for index, choice in enumerate(rows):
        alone = session.run(["logits"], data.row(index), adapter=choice)[0]
        assert_close(mixed[index : index + 1], alone)


def test_rows_may_come_as_a_tuple(session):
    assert_same_bits(logits(session, ("a", "b")), logits(session, ["a", "b"]))


def test_equal_rows_are_one_choice_for_the_batch(session):
    assert_same_bits(logits(session, ["a", "a"]), logits(session, "a"))
    assert_same_bits(logits(session, [None, None]), logits(session))


def test_heads_of_different_widths_share_a_batch(session):
    session.load_adapter("two", tiny.adapter("two", 5, labels=2))
    session.load_adapter("five", tiny.adapter("five", 6, labels=5))
    data = tiny.batch(rows=3)
    mixed = logits(session, ["two", "five", None], data)
    assert mixed.shape == (3, 5)
    for index, (choice, width) in enumerate([("two", 2), ("five", 5), (None, 3)]):
        alone = session.run(["logits"], data.row(index), adapter=choice)[0]
        assert_close(mixed[index : index + 1, :width], alone)
        assert np.isneginf(mixed[index, width:]).all()


def test_a_replaced_head_and_norm_equal_the_oracle(session):
    own = tiny.adapter("own", 7, labels=4, norm=True)
    session.load_adapter("own", own)
    assert_close(logits(session, "own"), tiny.oracle(DATA, (own, 1.0)))


def test_rows_are_refused_where_the_graph_cannot_take_them(tmp_path):
    session = open_session(tiny.make_package(tmp_path / "p", per_row=False))
    with pytest.raises(SelectionError, match=r"layer\.q"):
        logits(session, ["a", "b"])
    assert_close(logits(session, ["a", "a"]), tiny.oracle(DATA, (tiny.adapter("a", 1), 1.0)))


def test_an_adapter_loaded_again_under_its_name_is_another(session):
    stale = logits(session, {"a": 0.5}), logits(session, ["a", "b"])
    session.unload_adapter("a")
    session.load_adapter("a", tiny.adapter("a", 9))
    assert_close(logits(session, {"a": 0.5}), tiny.oracle(DATA, (tiny.adapter("a", 9), 0.5)))
    assert not np.allclose(logits(session, ["a", "b"])[0], stale[1][0])


def test_a_replaced_adapter_gives_its_answers_and_no_mixture_of_the_old_one(session):
    new = tiny.adapter("a", 9)
    session.run(None, DATA.feeds, adapter={"a": 0.5, "b": 0.5})
    session.load_adapter("a", new, replace=True)
    assert_close(session.run(None, DATA.feeds, adapter="a")[0], tiny.oracle(DATA, (new, 1.0)))
    mixed = session.run(None, DATA.feeds, adapter={"a": 0.5, "b": 0.5})[0]
    assert_close(mixed, tiny.oracle(DATA, (new, 0.5), (session.adapters["b"], 0.5)))


def test_replacing_a_name_that_is_free_loads_it(session):
    new = tiny.adapter("c", 9)
    session.load_adapter("c", new, replace=True)
    assert_close(session.run(None, DATA.feeds, adapter="c")[0], tiny.oracle(DATA, (new, 1.0)))


def test_an_adapter_that_is_refused_leaves_the_one_in_its_place(session):
    before = session.run(None, DATA.feeds, adapter="a")[0]
    wrong = tiny.adapter("w", 1, dtype="float16")
    with pytest.raises(BindError):
        session.load_adapter("a", wrong, replace=True)
    assert_same_bits(session.run(None, DATA.feeds, adapter="a")[0], before)


def test_without_room_for_mixtures_the_answers_are_the_same(package, session):
    cramped = open_session(package, composed_bytes=0)
    for choice in ({"a": 0.5, "b": 0.5}, ["a", None]):
        assert_same_bits(logits(cramped, choice), logits(session, choice))


def test_the_outputs_belong_to_the_caller(session):
    first = logits(session, "a")
    kept = first.copy()
    logits(session, "b")
    assert_same_bits(first, kept)
    first[...] = 0
    assert_same_bits(logits(session, "a"), kept)


def test_a_mapped_adapter_is_not_read_from_its_file_again(package, tmp_path):
    original = tiny.adapter("a", 1)
    mapped = {}
    for index, (name, tensor) in enumerate(original.tensors.items()):
        tensor.tofile(tmp_path / str(index))
        mapped[name] = np.memmap(tmp_path / str(index), tensor.dtype, "r", shape=tensor.shape)
    session = AdapterSession(package, providers=CPU)
    session.load_adapter("a", tiny.bound("a", mapped))
    before = logits(session, "a")
    for file in tmp_path.iterdir():
        with file.open("r+b") as handle:
            handle.write(bytes(file.stat().st_size))
    assert_same_bits(logits(session, "a"), before)


def overwrite(package: Package, name: str) -> None:
    """Other values where the package's file holds a replaceable weight."""
    stored = package.replaceable[name].parts[0].stored
    with (package.path / stored.file).open("r+b") as handle:
        handle.seek(stored.offset)
        handle.write(bytes(stored.size))


@pytest.mark.parametrize("labels", [tiny.LABELS, 5])
@pytest.mark.parametrize("harm", [overwrite, lambda package, _: (package.path / "model.onnx.data").unlink()])
def test_rows_beside_a_whole_weight_need_no_file_after_loading(tmp_path, labels, harm):
    package = tiny.make_package(tmp_path / "p")
    session = open_session(package, composed_bytes=0)
    session.load_adapter("own", tiny.adapter("own", 7, labels=labels))
    before = logits(session, ["own", None])
    harm(package, "score.weight")
    assert_same_bits(logits(session, ["own", None]), before)


def test_an_adapter_of_a_whole_weight_is_not_loaded_beside_an_overwritten_base(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    session = open_session(package)
    overwrite(package, "score.weight")
    with pytest.raises(PackageError, match=r"must hold the score\.weight that the package was made with"):
        session.load_adapter("own", tiny.adapter("own", 7, labels=tiny.LABELS))
    assert "own" not in session.adapters


def test_a_package_whose_weights_are_gone_says_so_when_an_adapter_needs_them(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    session = open_session(package)
    (package.path / "model.onnx.data").unlink()
    with pytest.raises(PackageError, match=r"model\.onnx\.data: cannot be read"):
        session.load_adapter("own", tiny.adapter("own", 7, labels=tiny.LABELS))


def test_a_whole_weight_without_rows_that_equals_the_bases_goes_beside_the_base(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    session = open_session(package)
    norm = tiny.weights()["norm"]
    session.load_adapter("same", tiny.bound("same", tiny.adapter("a", 1).tensors | {"norm.weight": norm}))
    (package.path / "model.onnx.data").unlink()
    assert_close(logits(session, ["same", None]), logits(session, ["a", None]))


def test_loading_an_adapter_of_another_base_is_logged_and_strictly_refused(package, caplog):
    named = Package(package.path, replace(package.manifest, source={"made_by": "optimum", "from": "gpt2-medium"}))
    session = AdapterSession(named, providers=CPU)
    plain = tiny.adapter("a", 1)
    other = replace(plain, origin=replace(plain.origin, base_model="openai/gpt2"))
    session.load_adapter("a", other)
    assert (
        "'a': it says that it was trained on 'openai/gpt2', and the package was made from 'gpt2-medium'" in caplog.text
    )
    with pytest.raises(BindError, match="gpt2-medium"):
        session.load_adapter("again", other, strict=True)


def test_adapters_shows_what_is_loaded_and_cannot_be_changed(session):
    assert list(session.adapters) == ["a", "b"]
    with pytest.raises(TypeError):
        session.adapters["c"] = tiny.adapter("c", 3)
    session.unload_adapter("a")
    assert list(session.adapters) == ["b"]


def test_load_returns_the_bound_adapter_with_its_coverage(session):
    bound = session.load_adapter("c", tiny.adapter("c", 3, modules=["layer.up"]))
    assert bound.coverage.at_base == ("layer.q", "layer.k")
    assert session.adapters["c"] is bound


def test_a_graph_takes_only_its_own_part_of_an_adapter(tmp_path):
    whole = tiny.make_package(tmp_path / "p", graphs=("one", "two"))
    one, two = whole.manifest.graphs
    half = replace(one, points=one.points[:2], branches=one.branches[:2], replaceable=())
    package = Package(whole.path, replace(whole.manifest, graphs=(half, two)))
    both = tiny.adapter("both", 3, labels=4)
    session = AdapterSession(package, graph="one", providers=CPU)
    session.load_adapter("both", both)
    session.load_adapter("b", tiny.adapter("b", 2))
    only = tiny.bound(
        "only", {name: both.tensors[name] for name in both.tensors if name.startswith(("layer.q", "layer.k"))}
    )
    assert_close(logits(session, "both"), tiny.oracle(DATA, (only, 1.0)))
    assert_close(
        logits(session, {"both": 1, "b": 0.5})[:, :1],
        tiny.oracle(DATA, (only, 1.0), (tiny.adapter("b", 2, modules=["layer.q", "layer.k"]), 0.5))[:, :1],
    )
    assert logits(session, ["both", "b"]).shape == (2, 3)


def test_several_graphs_need_a_name(tmp_path):
    package = tiny.make_package(tmp_path / "p", graphs=("one", "two"))
    with pytest.raises(PackageError, match="one, two"):
        AdapterSession(package, providers=CPU)


def test_it_shows_the_models_inputs_not_the_adapters(session):
    assert [arg.name for arg in session.get_inputs()] == ["x", "mask"]
    assert [arg.name for arg in session.get_outputs()] == ["logits", "up_all"]
    assert session.get_overridable_initializers() == []
    assert session.get_providers() == CPU
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_modelmeta().graph_name == "points"


@pytest.mark.parametrize("name", ["io_binding", "run_with_iobinding", "run_with_ort_values", "run_async"])
def test_ways_around_the_adapter_are_absent_and_say_so(session, name):
    with pytest.raises(AttributeError, match=r"use run\(\)"):
        getattr(session, name)
    assert not hasattr(session, name)


def test_session_options_given_are_used(package, tmp_path):
    options = one_thread()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    AdapterSession(package, providers=CPU, sess_options=options)
    assert (tmp_path / "optimized.onnx").exists()


def test_a_name_is_taken_once(session):
    with pytest.raises(SelectionError, match="loaded already"):
        session.load_adapter("a", tiny.adapter("a", 1))


@pytest.mark.parametrize("name", ["", None, 7])
def test_a_name_must_be_a_string(session, name):
    with pytest.raises(SelectionError, match="must be a string"):
        session.load_adapter(name, tiny.adapter("a", 1))


def test_unloading_what_is_not_loaded_is_refused(session):
    with pytest.raises(SelectionError, match="no adapter 'c' is loaded; loaded: 'a', 'b'"):
        session.unload_adapter("c")


def test_what_is_no_adapter_is_refused(session):
    with pytest.raises(SelectionError, match="must be a path, an Adapter or a BoundAdapter"):
        session.load_adapter("c", 3)


def test_a_path_without_an_adapter_is_refused(session, tmp_path):
    with pytest.raises(AdapterFileError):
        session.load_adapter("c", tmp_path)
    assert "c" not in session.adapters


def test_an_adapter_bound_to_other_shapes_is_refused(session):
    wrong = tiny.bound("w", {"layer.q.lora_A.weight": np.zeros((1, 9, 2), "f"), "other": np.zeros(3, "f")})
    with pytest.raises(BindError) as caught:
        session.load_adapter("w", wrong)
    shape, unknown, pair = caught.value.problems
    assert "[1, 8, None]" in shape
    assert "[1, 9, 2]" in shape
    assert unknown == "other is no input of this package"
    assert "both" in pair


def test_an_adapter_bound_to_another_type_is_refused(session):
    with pytest.raises(BindError, match="float16"):
        session.load_adapter("w", tiny.adapter("w", 1, dtype="float16"))


def test_half_a_pair_is_refused(session):
    half = {"layer.q.lora_A.weight": np.zeros((1, 8, 2), "f")}
    with pytest.raises(BindError, match=r"layer\.q.*both"):
        session.load_adapter("w", tiny.bound("w", half))


def test_a_pair_of_two_ranks_is_refused(session):
    pair = {"layer.q.lora_A.weight": np.zeros((1, 8, 2), "f"), "layer.q.lora_B.weight": np.zeros((1, 3, 6), "f")}
    with pytest.raises(BindError, match=r"layer\.q.*ranks"):
        session.load_adapter("w", tiny.bound("w", pair))


def test_an_adapter_bound_to_another_base_is_refused(session):
    other = replace(tiny.adapter("w", 1), base_digests={"layer.q": "0" * 64})
    with pytest.raises(BindError, match="another base"):
        session.load_adapter("w", other)


def test_a_missing_data_file_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    (package.path / "model.onnx.data").unlink()
    with pytest.raises(PackageError, match=r"model\.onnx\.data is missing"):
        AdapterSession(package.path)


def test_a_data_file_lost_after_opening_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    (package.path / "model.onnx.data").unlink()
    with pytest.raises(PackageError, match="ONNX Runtime cannot open"):
        AdapterSession(package, providers=CPU)


def test_a_damaged_graph_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    (package.path / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(PackageError, match=r"model\.onnx"):
        AdapterSession(package, providers=CPU)


def test_a_graph_without_the_inputs_of_the_manifest_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    model = onnx.load(package.path / "base.onnx", load_external_data=False)
    onnx.save(model, package.path / "model.onnx")
    with pytest.raises(PackageError, match=r"layer\.q\.lora_A\.weight is missing"):
        AdapterSession(package, providers=CPU)


def test_provider_arguments_that_do_not_fit_are_refused(package):
    with pytest.raises(InputError, match="providers"):
        AdapterSession(package, providers=CPU, provider_options=[{}, {}])


def test_no_state_is_left_on_disk(package, session):
    logits(session, ["a", "b"])
    assert sorted(path.name for path in Path(package.path).iterdir()) == [
        "base.onnx",
        "config.json",
        "extra",
        "model.onnx",
        "model.onnx.data",
        "onnx_lora.json",
        "tokenizer.json",
    ]


def test_a_separate_base_answers_as_the_graph_with_points(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    together, apart = AdapterSession(package, providers=CPU), AdapterSession(package, providers=CPU, separate_base=True)
    for session in (together, apart):
        session.load_adapter("a", tiny.adapter("a", 2))
    for adapter in (None, "a", {"a": 0.5}, None):
        assert_close(logits(apart, adapter), logits(together, adapter))


def test_a_separate_base_that_is_missing_is_refused(tmp_path):
    package = tiny.make_package(tmp_path / "p")
    (package.path / package.graph().base_file).unlink()
    with pytest.raises(PackageError):
        AdapterSession(package, providers=CPU, separate_base=True)
