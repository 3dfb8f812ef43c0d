"""Binding: what fits is laid out as the graph's inputs, what does not is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_lora import Package, bind
from onnx_lora.adapters import Delta, Replacement
from onnx_lora.errors import BindError
from onnx_lora.manifest import Unplaced
from tests.adapters.building import PackageBuilder, adapter, bound, delta, effect, numbers
from tests.support.numbers import assert_close, assert_same_bits


@pytest.fixture
def package(tmp_path: Path) -> Package:
    builder = PackageBuilder(tmp_path / "package").point("bert.l0.q", 4, 6).point("bert.l0.v", 4, 5)
    builder.weight("score.weight", 4, 2, free=True).bias("score.bias", 2, free=True).whole("bert.norm.weight", 4)
    builder.weight("dense.weight", 4, 4).untargeted = ("bert.l0.k", "bert.l0.o")
    return builder.open()


def refused(package: Package, *args: object, **more: object) -> BindError:
    with pytest.raises(BindError) as caught:
        bind(adapter(*args, **more), package)  # type: ignore[arg-type]
    assert str(caught.value).startswith("somewhere/adapter: ")
    return caught.value


def test_factors_are_transposed_and_the_scale_is_in_b(package: Package) -> None:
    d = delta(4, 6, scale=0.3)
    tensors = bound(package, {"bert.l0.q": d}).tensors
    assert tensors["bert.l0.q.lora_A.weight"].shape == (1, 4, 2)
    assert tensors["bert.l0.q.lora_B.weight"].shape == (1, 2, 6)
    expected = (d.b.astype(np.float64) @ d.a.astype(np.float64) * 0.3).T[None]
    assert_close(effect(tensors, "bert.l0.q"), expected)


def test_whole_weights_are_laid_out_as_inputs(package: Package) -> None:
    weight, bias, norm = numbers(3, 4), numbers(3), numbers(4)
    tensors = bound(package, None, {"score.weight": weight, "score.bias": bias, "bert.norm.weight": norm}).tensors
    assert_same_bits(tensors["score.weight"], np.ascontiguousarray(weight.T)[None])
    assert_same_bits(tensors["score.bias"], bias[None, None])
    assert_same_bits(tensors["bert.norm.weight"], norm)


def test_bound_tensors_are_contiguous_read_only_and_no_views_of_the_adapters(package: Package) -> None:
    a, b, norm = numbers(1, 4), numbers(6, 1), numbers(4)
    tensors = bound(package, {"bert.l0.q": Delta(a, b, 1.0)}, {"bert.norm.weight": norm}).tensors
    for tensor in tensors.values():
        assert tensor.flags.c_contiguous
        assert not tensor.flags.writeable
        assert not any(np.shares_memory(tensor, source) for source in (a, b, norm))
    assert all(source.flags.writeable for source in (a, b, norm))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_tensors_take_the_points_type(tmp_path: Path, dtype: str) -> None:
    package = PackageBuilder(tmp_path / "package", dtype=dtype).point("q", 4, 6).open()
    assert {tensor.dtype.name for tensor in bound(package, {"q": delta(4, 6)}).tensors.values()} == {dtype}


def test_coverage_says_what_is_applied_and_what_is_not(package: Package) -> None:
    silent = Delta(numbers(3, 4), np.zeros((6, 3), np.float32), 1.0)
    coverage = bound(package, {"bert.l0.q": silent}, {"bert.norm.weight": numbers(4)}, notes=("a note",)).coverage
    assert coverage.applied == ("bert.l0.q",)
    assert coverage.replaced == ("bert.norm.weight",)
    assert coverage.at_base == ("bert.l0.v",)
    assert coverage.silent == ("bert.l0.q",)
    assert coverage.ranks == {"bert.l0.q": 3}
    assert coverage.notes[0] == "a note"
    assert "never trained" in coverage.notes[1]


def test_deltas_without_effect_are_counted(package: Package) -> None:
    silent = Delta(numbers(3, 4), np.zeros((6, 3), np.float32), 1.0)
    coverage = bound(package, {"bert.l0.q": silent, "bert.l0.v": delta(4, 5)}).coverage
    assert coverage.silent == ("bert.l0.q",)
    assert coverage.notes == ("1 of 2 deltas change nothing, their B is zero",)


def test_a_pair_that_changes_nothing_of_a_module_that_is_not_there_is_noted(package: Package) -> None:
    idle = Delta(numbers(3, 4), np.zeros((4, 3), np.float32), 1.0)
    coverage = bound(package, {"bert.l0.q": delta(4, 6), "pooler.dense": idle}).coverage
    assert coverage.applied == ("bert.l0.q",)
    assert coverage.notes == ("pooler.dense: not in the package, and B is zero: there is nothing to apply",)


@pytest.mark.parametrize("name", ["pooler.dense", "bert.l0.k"])
@pytest.mark.parametrize(
    "other",
    [
        Delta(numbers(3, 4), np.zeros((4, 3), np.float32), 1.0, magnitude=numbers(4)),
        Delta(np.full((3, 4), np.inf, np.float32), np.zeros((4, 3), np.float32), 1.0),
        Delta(numbers(3, 4), np.full((4, 3), 1e-30, np.float32), 1.0),
    ],
    ids=["DoRA", "not finite", "nearly zero"],
)
def test_a_pair_that_may_change_something_needs_its_module(package: Package, name: str, other: Delta) -> None:
    assert f"{name}: " in str(refused(package, {"bert.l0.q": delta(4, 6), name: other}))


def test_an_untrained_adapter_of_another_model_is_refused(package: Package) -> None:
    idle = Delta(numbers(3, 4), np.zeros((4, 3), np.float32), 1.0)
    assert "x.q: the package has no such module" in str(refused(package, {"x.q": idle, "x.v": idle}))


def test_digests_of_what_is_touched_are_kept(package: Package) -> None:
    digests = bound(package, {"bert.l0.q": delta(4, 6)}, {"bert.norm.weight": numbers(4)}).base_digests
    assert digests == {
        "bert.l0.q": package.points["bert.l0.q"].sha256,
        "bert.norm.weight": package.replaceable["bert.norm.weight"].sha256,
    }


def test_an_empty_adapter_is_refused(package: Package) -> None:
    assert "it holds nothing" in str(refused(package))


def test_a_module_without_a_point_names_the_export_that_gives_it_one(package: Package) -> None:
    assert "export again with `targets=` including k" in str(refused(package, {"bert.l0.k": delta(4, 4)}))


def test_an_unknown_module_names_the_closest(package: Package) -> None:
    error = refused(package, {"bert.l0.q": delta(4, 6), "bert.l0.qq": delta(4, 6)})
    assert "bert.l0.qq: the package has no such module; the closest are" in str(error)
    assert "bert.l0.q" in error.problems[0].split("closest are")[1]


def test_an_unknown_module_mentions_nodes_that_were_not_placed(tmp_path: Path) -> None:
    builder = PackageBuilder(tmp_path / "package").point("q", 4, 6)
    builder.unplaced = (Unplaced("/MatMul_7", "no name"),)
    assert "1 weighted nodes" in str(refused(builder.open(), {"zzz": delta(4, 6)}))


def test_a_prefix_that_all_names_lack_is_named(package: Package) -> None:
    error = refused(package, {"l0.q": delta(4, 6), "l0.v": delta(4, 5)})
    assert len(error.problems) == 1
    assert "lacks the prefix 'bert.'" in str(error)


def test_a_prefix_that_all_names_have_too_much_is_named(package: Package) -> None:
    error = refused(package, {"x.bert.l0.q": delta(4, 6), "x.bert.l0.v": delta(4, 5)})
    assert "has a prefix 'x.'" in str(error)


def test_a_wrong_number_of_inputs_is_refused_with_both_values(package: Package) -> None:
    assert "lora_A must have 4 inputs, and has 3" in str(refused(package, {"bert.l0.q": delta(3, 6)}))


def test_a_wrong_number_of_outputs_is_refused_with_both_values(package: Package) -> None:
    assert "lora_B must have 6 outputs, and has 7" in str(refused(package, {"bert.l0.q": delta(4, 7)}))


@pytest.mark.parametrize("ranks", [(2, 3), (0, 0)])
def test_ranks_that_disagree_or_are_zero_are_refused(package: Package, ranks: tuple[int, int]) -> None:
    bad = Delta(numbers(ranks[0], 4), numbers(6, ranks[1]), 1.0)
    assert "the ranks must agree and be at least 1" in str(refused(package, {"bert.l0.q": bad}))


def test_factors_that_are_no_matrices_are_refused(package: Package) -> None:
    assert "must have 2 axes" in str(refused(package, {"bert.l0.q": Delta(numbers(4), numbers(6, 1), 1.0)}))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(package: Package, scale: float) -> None:
    assert "the scale must be finite" in str(refused(package, {"bert.l0.q": delta(4, 6, scale=scale)}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_counted(package: Package, value: float) -> None:
    d = delta(4, 6)
    d.b[1, 1] = value
    norm = numbers(4)
    norm[:3] = value
    error = refused(package, {"bert.l0.q": d}, {"bert.norm.weight": norm})
    assert "bert.l0.q.lora_B.weight: 1 of 12 values are NaN or infinite" in str(error)
    assert "bert.norm.weight: 3 of 4 values" in str(error)


def test_integers_are_refused(package: Package) -> None:
    bad = Delta(np.ones((2, 4), np.int64), numbers(6, 2), 1.0)
    assert "lora_A.weight: must be floating point, and is int64" in str(refused(package, {"bert.l0.q": bad}))


def test_values_beyond_float16_are_refused_for_a_float16_package(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "package", dtype="float16").point("q", 4, 6).open()
    assert "does not fit float16 (at most 65504)" in str(refused(package, {"q": delta(4, 6, scale=1e6)}))


def test_all_problems_are_told_at_once(package: Package) -> None:
    error = refused(package, {"bert.l0.q": delta(3, 7), "nothing": delta(1, 1)}, {"bert.norm.weight": numbers(5)})
    assert len(error.problems) == 4


# --- whole weights -----------------------------------------------------------------------------


def test_a_parameter_of_a_known_module_names_the_export_that_exposes_it(package: Package) -> None:
    error = refused(package, None, {"bert.l0.q.bias": numbers(6)})
    assert "export again with `replaceable=` including bert.l0.q" in str(error)


def test_a_parameter_of_an_unknown_module_is_refused(package: Package) -> None:
    assert "knows no module of that name" in str(refused(package, None, {"other.norm.weight": numbers(4)}))


def test_a_whole_weight_of_another_shape_is_refused_with_both(package: Package) -> None:
    assert "dense.weight: must have shape (4, 4), and has (3, 4)" in str(
        refused(package, None, {"dense.weight": numbers(3, 4)})
    )


def test_a_free_head_must_keep_its_inputs(package: Package) -> None:
    error = refused(package, None, {"score.weight": numbers(3, 5), "score.bias": numbers(3)})
    assert "the number of outputs is free" in str(error)


@pytest.mark.parametrize("given", [{"score.weight": (3, 4)}, {"score.bias": (3,)}])
def test_half_a_head_of_another_width_is_refused(package: Package, given: dict[str, tuple[int, ...]]) -> None:
    error = refused(package, None, {name: numbers(*shape) for name, shape in given.items()})
    assert "score: the number of outputs must agree" in str(error)
    assert "2 for" in str(error)
    assert "the base's" in str(error)


def test_halves_of_different_width_are_refused(package: Package) -> None:
    error = refused(package, None, {"score.weight": numbers(3, 4), "score.bias": numbers(5)})
    assert "score: the number of outputs must agree" in str(error)


def test_half_a_head_of_the_bases_width_is_bound(package: Package) -> None:
    assert set(bound(package, None, {"score.weight": numbers(2, 4)}).tensors) == {"score.weight"}


def test_a_wider_head_with_a_point_on_it_is_refused(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "package").point("score", 4, 2).weight("score.weight", 4, 2, free=True).open()
    assert "the injection point score" in str(refused(package, None, {"score.weight": numbers(3, 4)}))


def test_the_bases_own_copy_needs_no_replaceable_weight(package: Package) -> None:
    """PEFT saves the base's lm_head along with LoRA on it."""
    own = numbers(6, 4, seed=50)
    result = bound(package, {"bert.l0.q": delta(4, 6)}, {"bert.l0.q.weight": Replacement(own, in_place=True)})
    assert result.coverage.replaced == ()
    assert "equal to the base's own" in result.coverage.notes[0]


def test_another_bases_copy_is_refused(package: Package) -> None:
    other = Replacement(numbers(6, 4, seed=51), in_place=True)
    assert "`replaceable=` including bert.l0.q" in str(
        refused(package, {"bert.l0.q": delta(4, 6)}, {"bert.l0.q.weight": other})
    )


def test_a_head_that_may_be_tied_is_not_overwritten_alone(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "package").weight("lm_head.weight", 4, 9).open()
    error = refused(package, None, {"lm_head.weight": Replacement(numbers(9, 4), in_place=True)})
    assert "every weight tied to it" in str(error)
    assert bound(package, None, {"lm_head.weight": numbers(9, 4)}).coverage.replaced == ("lm_head.weight",)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), (1, 4, 3, 1), (1, 3, 3)])
def test_a_weight_in_graph_layout_must_have_it(package: Package, shape: tuple[int, ...]) -> None:
    error = refused(package, None, {"dense.weight": Replacement(numbers(*shape), in_graph_layout=True)})
    assert "dense.weight: must have shape" in str(error)


def test_a_saved_module_that_is_missing_is_refused(package: Package) -> None:
    error = refused(package, {"bert.l0.q": delta(4, 6)}, saved_modules=("classifier", "score"))
    assert len(error.problems) == 1
    assert "score: the config says that PEFT saved this module whole" in str(error)


def test_a_saved_module_that_the_model_has_not_is_no_matter(package: Package) -> None:
    assert bound(package, {"bert.l0.q": delta(4, 6)}, saved_modules=("classifier",)).coverage.applied


def test_another_base_is_refused(package: Package) -> None:
    error = refused(package, {"bert.l0.q": delta(4, 6)}, base_digests={"bert.l0.q": "f" * 64})
    assert "bound to another base: 1 of 1" in str(error)
    own = {"bert.l0.q": package.points["bert.l0.q"].sha256}
    assert bound(package, {"bert.l0.q": delta(4, 6)}, base_digests=own).base_digests == own


def test_what_was_bound_is_read_from_no_file_again(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "p").point("q", 4, 6).whole("norm.weight", 4).open()
    values = {name: numbers(*shape) for name, shape in (("a", (1, 4)), ("b", (6, 1)), ("norm", (4,)))}
    mapped = {}
    for name, value in values.items():
        value.tofile(tmp_path / name)
        mapped[name] = np.memmap(tmp_path / name, value.dtype, "r", shape=value.shape)
    it = bound(
        package,
        {"q": Delta(mapped["a"], mapped["b"], 1.0)},
        {"norm.weight": mapped["norm"]},
    )
    for name, value in values.items():
        with (tmp_path / name).open("r+b") as file:
            file.write(bytes(value.nbytes))
    assert_same_bits(it.tensors["q.lora_A.weight"][0, :, 0], values["a"][0])
    assert_same_bits(it.tensors["norm.weight"], values["norm"])


# --- weights that others may share -------------------------------------------------------------


def _tied(folder: Path, *, head: bool = True, says: object = True) -> PackageBuilder:
    """A table and a head of equal weights, both replaceable."""
    builder = PackageBuilder(folder)
    builder.config = {} if says is None else {"tie_word_embeddings": says}
    same = numbers(9, 4, seed=5)
    builder.table_weight("embed_tokens", same)
    return builder.weight("lm_head.weight", 4, 9, values=same) if head else builder


def _in_place(**values: object) -> dict[str, Replacement]:
    return {f"{name}.weight": Replacement(value, in_place=True) for name, value in values.items()}  # type: ignore[arg-type]


def test_a_table_is_written_to_the_head_that_is_tied_to_it(tmp_path: Path) -> None:
    new = numbers(9, 4, seed=6)
    own = bound(_tied(tmp_path / "p").open(), None, _in_place(embed_tokens=new))
    assert set(own.coverage.replaced) == {"embed_tokens.weight", "lm_head.weight"}
    assert_same_bits(own.tensors["lm_head.weight"][0], np.ascontiguousarray(new.T))
    assert own.coverage.notes == ("lm_head gets the weight of embed_tokens too: the two are tied",)


def test_a_head_that_is_not_tied_keeps_its_weight(tmp_path: Path) -> None:
    own = bound(_tied(tmp_path / "p", says=False).open(), None, _in_place(embed_tokens=numbers(9, 4, seed=6)))
    assert own.coverage.replaced == ("embed_tokens.weight",)


def test_tied_modules_of_two_values_are_refused(tmp_path: Path) -> None:
    package = _tied(tmp_path / "p").open()
    values = _in_place(embed_tokens=numbers(9, 4, seed=6), lm_head=numbers(9, 4, seed=7))
    error = refused(package, None, values)
    assert "embed_tokens.weight: lm_head may be tied to it, and the file holds another value" in str(error)
    # The base's own value is another value too, where PEFT would write both to one place.
    base = package.default(package.replaceable["embed_tokens.weight"])
    error = refused(package, None, _in_place(embed_tokens=base, lm_head=numbers(9, 4, seed=7)))
    assert "lm_head.weight: embed_tokens may be tied to it, and the file holds another value" in str(error)


def test_a_table_without_a_head_in_the_graph_has_nothing_to_share(tmp_path: Path) -> None:
    own = bound(_tied(tmp_path / "p", head=False, says=None).open(), None, _in_place(embed_tokens=numbers(9, 4)))
    assert own.coverage.replaced == ("embed_tokens.weight",)


def test_a_head_that_may_be_among_unplaced_nodes_is_not_passed_over(tmp_path: Path) -> None:
    builder = _tied(tmp_path / "p", head=False, says=None)
    builder.unplaced = (Unplaced("MatMul_7", "no name"),)
    error = refused(builder.open(), None, _in_place(embed_tokens=numbers(9, 4)))
    assert "the package does not show whether one is" in str(error)


def test_modules_called_after_nodes_hint_at_the_checkpoint(tmp_path: Path) -> None:
    builder = PackageBuilder(tmp_path / "p").point("n101", 4, 6).point("n102", 4, 6)
    builder.source = {"made_by": "attach", "from": "a.onnx"}
    error = refused(builder.open(), {"layers.0.q_proj": delta(4, 6), "layers.0.v_proj": delta(4, 6)})
    (problem,) = error.problems
    assert (
        "layers.0.q_proj (and 1 more): the package has no such module; its own are called n101, n102, after" in problem
    )
    assert "attach the file again with the checkpoint" in problem


def test_a_table_that_is_the_bases_own_needs_nothing_replaceable(tmp_path: Path) -> None:
    same = numbers(9, 4, seed=5)
    builder = PackageBuilder(tmp_path / "p").point("q", 4, 6)
    package = builder.untargeted_weight("embed_tokens", same).untargeted_weight("lm_head", same).open()
    own = bound(package, {"q": delta(4, 6)}, _in_place(embed_tokens=same, lm_head=same))
    assert own.coverage.replaced == ()
    assert own.coverage.notes[0] == "embed_tokens.weight: equal to the base's own, nothing to replace"
    error = refused(package, None, _in_place(embed_tokens=numbers(9, 4, seed=6)))
    assert "lm_head is tied to it, and the package cannot replace that" in str(error)


def test_a_head_without_a_point_that_has_another_weight_is_not_tied(tmp_path: Path) -> None:
    builder = _tied(tmp_path / "p", head=False, says=None).untargeted_weight("lm_head", numbers(9, 4, seed=8))
    own = bound(builder.open(), None, _in_place(embed_tokens=numbers(9, 4, seed=6)))
    assert own.coverage.replaced == ("embed_tokens.weight",)
