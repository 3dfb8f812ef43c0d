"""Blends are exact sums, and every row of a batch gets what it would get alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from onnx_lora import Package
from onnx_lora.adapters import BoundAdapter, bind, blend, read_adapter, stack_rows, write_bound
from onnx_lora.adapters.compose import make_blend
from onnx_lora.errors import InputError, SelectionError
from tests.adapters.building import PackageBuilder, bound, delta, effect, numbers
from tests.support.numbers import assert_close, assert_same_bits


@pytest.fixture
def package(tmp_path: Path) -> Package:
    builder = PackageBuilder(tmp_path / "package").point("q", 4, 6).point("v", 4, 5).point("flat", 4, 3, per_row=False)
    builder.weight("score.weight", 4, 2, free=True).bias("score.bias", 2, free=True).whole("norm.weight", 4)
    return builder.weight("bare.weight", 4, 2, free=True).weight("late.weight", 4, 4, per_row=False).open()


@pytest.fixture
def sql(package: Package) -> BoundAdapter:
    return bound(package, {"q": delta(4, 6, scale=2.0), "v": delta(4, 5, rank=3)}, name="sql")


@pytest.fixture
def polite(package: Package) -> BoundAdapter:
    return bound(package, {"q": delta(4, 6, rank=5, seed=7)}, name="polite")


def head(package: Package, outputs: int, **more: object) -> BoundAdapter:
    return bound(package, None, {"score.weight": numbers(outputs, 4, seed=3), "score.bias": numbers(outputs)}, **more)


def test_one_part_of_weight_one_is_the_adapter_itself(sql: BoundAdapter) -> None:
    assert blend([(sql, 1.0)]) is sql.tensors


def test_no_part_is_the_base() -> None:
    assert blend([]) == {}


def test_a_blend_is_the_weighted_sum(sql: BoundAdapter, polite: BoundAdapter) -> None:
    tensors = blend([(sql, 0.7), (polite, -0.3)])
    assert tensors["q.lora_A.weight"].shape == (1, 4, 7)
    assert_close(effect(tensors, "q"), 0.7 * effect(sql.tensors, "q") - 0.3 * effect(polite.tensors, "q"))
    assert_close(effect(tensors, "v"), 0.7 * effect(sql.tensors, "v"))
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())


def test_an_adapter_with_itself_is_twice_the_adapter(sql: BoundAdapter) -> None:
    assert_close(effect(blend([(sql, 1.0), (sql, 1)]), "q"), 2 * effect(sql.tensors, "q"))


def test_weight_zero_has_no_effect(sql: BoundAdapter) -> None:
    assert not effect(blend([(sql, 0.0)]), "q").any()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True, 1j, 10**400])
def test_a_weight_that_is_no_finite_number_is_refused(sql: BoundAdapter, weight: object) -> None:
    with pytest.raises(SelectionError, match="sql: a weight must be a finite number"):
        blend([(sql, weight)])  # type: ignore[list-item]


def test_a_weight_that_overflows_is_refused(sql: BoundAdapter) -> None:
    with pytest.raises(SelectionError, match=r"takes q\.lora_B\.weight beyond what float32 holds"):
        blend([(sql, 1e39)])


def test_a_whole_weight_of_one_part_at_weight_one_is_allowed(package: Package, sql: BoundAdapter) -> None:
    other = head(package, 3)
    tensors = blend([(sql, 0.5), (other, 1.0)])
    assert tensors["score.weight"] is other.tensors["score.weight"]


@pytest.mark.parametrize("weights", [(0.5,), (1.0, 1.0), (0.0,)])
def test_whole_weights_are_not_scaled_or_added(package: Package, weights: tuple[float, ...]) -> None:
    other = head(package, 3, name="topic")
    with pytest.raises(SelectionError, match=r"score\.weight: a whole weight must come from one .* 'topic'"):
        blend([(other, weight) for weight in weights])


def test_adapters_of_different_packages_are_not_blended(tmp_path: Path, sql: BoundAdapter) -> None:
    other = PackageBuilder(tmp_path / "other").point("q", 9, 6).open()
    with pytest.raises(SelectionError, match="must be bound to one package"):
        blend([(sql, 1.0), (bound(other, {"q": delta(9, 6)}), 1.0)])


# --- blends as adapters of their own ------------------------------------------------------------


def test_a_blend_of_one_part_at_weight_one_is_that_adapter(sql: BoundAdapter) -> None:
    assert make_blend([(sql, 1)], name="it") is sql


def test_a_blend_of_nothing_is_no_adapter() -> None:
    with pytest.raises(SelectionError, match="must have an adapter at least"):
        make_blend([], name="it")


def test_a_blended_adapter_says_what_it_is_made_of(package: Package, sql: BoundAdapter, polite: BoundAdapter) -> None:
    topic = bound(
        package, None, {"score.weight": numbers(3, 4), "score.bias": numbers(3)}, name="topic", notes=("odd",)
    )
    one = make_blend([(polite, 0.7), (sql, -0.25), (topic, 1.0)], name="it")
    assert (one.name, one.origin.method) == ("it", "blend of polite:0.7, sql:-0.25, topic:1")
    assert (one.origin.path, one.origin.format, one.origin.base_model) == ("adapter, adapter, adapter", "peft", "tiny")
    assert one.origin.sha256 == ", ".join(["0" * 64] * 3)
    cover = one.coverage
    assert (cover.applied, cover.at_base, cover.silent) == (("q", "v"), ("flat",), ())
    assert (cover.replaced, cover.ranks) == (("score.bias", "score.weight"), {"q": 7, "v": 3})
    assert cover.notes == ("topic: odd",)
    assert one.base_digests == {**sql.base_digests, **polite.base_digests, **topic.base_digests}
    assert one.graphs == sql.graphs
    expected = blend([(polite, 0.7), (sql, -0.25), (topic, 1.0)])
    assert one.tensors.keys() == expected.keys()
    for name, tensor in one.tensors.items():
        assert_same_bits(tensor, expected[name])
        assert tensor.flags.c_contiguous
        assert not tensor.flags.writeable


def test_strength_zero_is_told(sql: BoundAdapter) -> None:
    assert make_blend([(sql, 0.0)], name="off").coverage.silent == ("q", "v")


def test_adapters_of_different_bases_are_not_blended_into_one(sql: BoundAdapter, polite: BoundAdapter) -> None:
    other = replace(polite, base_digests={"q": "0" * 64})
    with pytest.raises(SelectionError, match="polite: 1 of its base weights are others, the first is q"):
        make_blend([(sql, 0.5), (other, 0.5)], name="it")


@pytest.mark.parametrize("format", ["safetensors", "onnx_adapter"])
def test_a_blend_goes_through_a_file(
    package: Package, sql: BoundAdapter, polite: BoundAdapter, tmp_path: Path, format: Literal["safetensors"]
) -> None:
    one = make_blend([(sql, 0.7), (polite, 0.3)], name="it")
    file = write_bound(one, tmp_path / f"it.{format}", format=format)
    again = bind(read_adapter(file), package)
    assert (again.name, again.coverage.ranks) == ("it", one.coverage.ranks)
    assert again.origin.method == (one.origin.method if format == "safetensors" else "")
    for name, tensor in one.tensors.items():
        assert_same_bits(again.tensors[name], tensor)


# --- rows --------------------------------------------------------------------------------------


def test_no_rows_and_one_row_are_themselves(package: Package, sql: BoundAdapter) -> None:
    assert stack_rows([], package) == {}
    assert stack_rows([{}], package) == {}
    assert stack_rows([sql.tensors], package) == dict(sql.tensors)


def test_every_row_has_the_effect_of_its_own_adapter(package: Package, sql: BoundAdapter, polite: BoundAdapter) -> None:
    mixed = blend([(sql, 0.5), (polite, 2.0)])
    rows = [sql.tensors, {}, mixed, polite.tensors]
    tensors = stack_rows(rows, package)
    for module, outputs in (("q", 6), ("v", 5)):
        result = effect(tensors, module)
        for index, row in enumerate(rows):
            has = f"{module}.lora_A.weight" in row
            expected = effect(row, module)[0] if has else np.zeros((4, outputs))
            assert_close(result[index], expected, dtype="float64")
    assert tensors["q.lora_A.weight"].shape == (4, 4, 7)
    assert "flat.lora_A.weight" not in tensors


def test_the_same_adapter_in_all_rows_stays_one_row(package: Package, sql: BoundAdapter) -> None:
    tensors = stack_rows([sql.tensors, dict(sql.tensors)], package)
    assert tensors["q.lora_A.weight"] is sql.tensors["q.lora_A.weight"]


def test_the_same_adapter_in_some_rows_does_not(package: Package, sql: BoundAdapter) -> None:
    tensors = stack_rows([sql.tensors, sql.tensors, {}], package)
    assert tensors["q.lora_A.weight"].shape[0] == 3
    assert not effect(tensors, "q")[2].any()


def test_heads_of_one_width_are_stacked_with_the_bases_own(package: Package) -> None:
    other = head(package, 2)
    tensors = stack_rows([other.tensors, {}], package)
    assert_same_bits(tensors["score.weight"][:1], other.tensors["score.weight"])
    for name in ("score.weight", "score.bias"):
        assert_same_bits(tensors[name][1:], package.default(package.replaceable[name]))
    assert "bare.weight" not in tensors


def test_heads_of_different_widths_leave_softmax_and_argmax_right(package: Package) -> None:
    rows = [head(package, 5).tensors, {}, head(package, 3).tensors]
    tensors = stack_rows(rows, package)
    x = numbers(3, 1, 4, seed=11).astype(np.float64)
    logits = (x @ tensors["score.weight"] + tensors["score.bias"])[:, 0]
    assert logits.shape == (3, 5)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for index, row in enumerate(rows):
        own = row or {name: package.default(package.replaceable[name]) for name in ("score.weight", "score.bias")}
        alone = (x[index] @ own["score.weight"][0] + own["score.bias"][0])[0]
        width = len(alone)
        assert_close(probabilities[index, :width], np.exp(alone) / np.exp(alone).sum())
        assert not probabilities[index, width:].any()
        assert np.isneginf(logits[index, width:]).all()


def test_a_whole_weight_of_one_row_does_not_reach_the_others(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "p").weight("d.weight", 4, 4).bias("d.bias", 4).open()
    other = bound(package, None, {"d.bias": numbers(4)})
    tensors = stack_rows([{}, other.tensors], package)
    assert set(tensors) == {"d.bias"}
    assert_same_bits(tensors["d.bias"][:1], package.default(package.replaceable["d.bias"]))
    assert_same_bits(tensors["d.bias"][1:], other.tensors["d.bias"])


def test_heads_of_different_widths_without_a_bias_are_refused(package: Package) -> None:
    wide = bound(package, None, {"bare.weight": numbers(3, 4)})
    with pytest.raises(SelectionError, match="bare: rows with 2, 3 outputs need its bias"):
        stack_rows([wide.tensors, {}], package)


def test_points_that_take_one_adapter_are_refused_where_rows_differ(package: Package) -> None:
    flat = bound(package, {"flat": delta(4, 3)})
    with pytest.raises(SelectionError, match="separate calls") as caught:
        stack_rows([flat.tensors, {}], package)
    assert "flat: its place in the graph takes one adapter" in str(caught.value)
    assert stack_rows([flat.tensors, flat.tensors], package)["flat.lora_A.weight"].shape[0] == 1


def test_equal_adapters_are_the_same_for_a_point_that_takes_one(package: Package) -> None:
    rows = [bound(package, {"flat": delta(4, 3)}).tensors for _ in range(2)]
    assert stack_rows(rows, package)["flat.lora_A.weight"].shape[0] == 1


@pytest.mark.parametrize("name, shape", [("norm.weight", (4,)), ("late.weight", (4, 4))])
def test_whole_weights_without_rows_are_refused_where_rows_differ(
    package: Package, name: str, shape: tuple[int, ...]
) -> None:
    other = bound(package, None, {name: numbers(*shape)})
    with pytest.raises(SelectionError, match=f"{name}: the graph takes one value for all rows"):
        stack_rows([other.tensors, {}], package)
    assert stack_rows([other.tensors, other.tensors], package)[name] is other.tensors[name]


def test_all_problems_of_a_call_are_told_at_once(package: Package) -> None:
    row = bound(package, {"flat": delta(4, 3)}, {"norm.weight": numbers(4), "bare.weight": numbers(3, 4)})
    with pytest.raises(SelectionError) as caught:
        stack_rows([row.tensors, {}], package)
    assert len(caught.value.problems) == 3


def test_a_message_spells_out_what_a_blend_is_made_of() -> None:
    spelt = "Sequence[tuple[BoundAdapter, float | Mapping[str, float]]]"
    with pytest.raises(InputError, match=re.escape(f"parts must be {spelt}, and is int 3")):
        blend(3)  # type: ignore[arg-type]
