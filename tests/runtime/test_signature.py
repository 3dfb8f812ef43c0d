"""Graphs whose inputs are not the usual ones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from onnx_lora.errors import FeedError, SelectionError
from onnx_lora.runtime.signature import Signature
from tests.runtime import tiny
from tests.support.numbers import assert_same_bits


def signature(*inputs: tuple[str, str, list[int | str | None]]) -> Signature:
    args = [SimpleNamespace(name=name, type=kind, shape=shape) for name, kind, shape in inputs]
    return Signature.of(
        SimpleNamespace(get_inputs=lambda: args, get_overridable_initializers=list, get_outputs=list), frozenset()
    )


def test_an_input_with_a_fixed_first_axis_does_not_count_rows():
    own = signature(("x", "tensor(float)", ["batch", 4]), ("table", "tensor(float)", [7, 4]))
    own.check_rows(2, {"x": np.zeros((2, 4), "f"), "table": np.zeros((7, 4), "f")})


def test_where_all_first_axes_are_fixed_one_must_have_the_rows():
    own = signature(("x", "tensor(float)", [2, 4]))
    own.check_rows(2, {"x": np.zeros((2, 4), "f")})
    with pytest.raises(SelectionError, match="x has 2 rows"):
        own.check_rows(3, {"x": np.zeros((2, 4), "f")})


def test_a_vector_has_no_rows():
    own = signature(("steps", "tensor(int64)", ["steps"]))
    with pytest.raises(SelectionError, match="no input has a batch axis"):
        own.check_rows(1, {"steps": np.zeros(1, np.int64)})


def test_strings_are_left_to_onnxruntime():
    own = signature(("text", "tensor(string)", ["batch"]))
    own.check_feeds({"text": np.array(["a"], object)})
    assert not own.plain


def test_an_optional_input_may_be_left_out():
    signature(("cache", "optional(tensor(float))", ["batch", 4])).check_feeds({})


def test_a_shape_that_is_not_known_takes_any():
    signature(("x", "tensor(float)", [])).check_feeds({"x": np.zeros((2, 3), "f")})


def test_a_dimension_without_a_name_is_shown_as_free():
    with pytest.raises(FeedError, match=r"x: float32 \[\?, 4\]"):
        signature(("x", "tensor(float)", [None, 4])).check_feeds({})


def test_both_ways_of_running_give_the_same(session, monkeypatch):
    feeds = tiny.batch().feeds
    expected = session.run(None, feeds, adapter=["a", {"b": 0.5}])
    monkeypatch.setattr(Signature, "plain", False)
    for actual, wanted in zip(session.run(None, feeds, adapter=["a", {"b": 0.5}]), expected, strict=True):
        assert_same_bits(actual, wanted)
