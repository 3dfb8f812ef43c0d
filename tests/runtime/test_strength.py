"""Strength by block: weights for groups of modules, in calls, rows, blends and folded models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnx_lora import fold, fold_to
from onnx_lora.adapters import blend
from onnx_lora.errors import SelectionError
from onnx_lora.runtime import read_folded
from onnx_lora.strength import as_strength, weight_in
from tests.runtime import tiny
from tests.runtime.conftest import open_session
from tests.support.numbers import assert_close

DATA = tiny.batch()


def weighed(own, weights):
    """The adapter with B of each module times its own weight: what a strength by block means."""
    tensors = dict(own.tensors)
    for module, weight in weights.items():
        name = f"{module}.lora_B.weight"
        tensors[name] = (tensors[name].astype(np.float64) * weight).astype(tensors[name].dtype)
    return replace(own, tensors=tensors)


@pytest.mark.parametrize(
    "strength, weights",
    [
        ({"layer": 0.5}, {"layer.q": 0.5, "layer.k": 0.5, "layer.up": 0.5}),
        ({"up": 0.25, "*": 2.0}, {"layer.q": 2.0, "layer.k": 2.0, "layer.up": 0.25}),
        ({"layer": 0.5, "layer.q": 0.0}, {"layer.q": 0.0, "layer.k": 0.5, "layer.up": 0.5}),
        ({"layer.up": -1}, {"layer.up": -1.0}),
        ({"*": 0.5}, {"layer.q": 0.5, "layer.k": 0.5, "layer.up": 0.5}),
    ],
    ids=str,
)
def test_every_group_has_its_weight(package, strength, weights) -> None:
    session = open_session(package)
    own = session.adapters["a"]
    expected = tiny.oracle(DATA, (weighed(own, weights), 1.0))
    assert_close(session.run(None, DATA.feeds, adapter={"a": strength})[0], expected)
    assert_close(fold(package, [(own, strength)]).run(None, DATA.feeds)[0], expected)


def test_groups_blend_and_differ_by_row(package) -> None:
    session = open_session(package)
    a, b = session.adapters["a"], session.adapters["b"]
    parts = (weighed(a, {"layer.up": 0.25}), 1.0), (b, 0.5)
    mixed = session.run(None, DATA.feeds, adapter={"a": {"up": 0.25}, "b": 0.5})[0]
    assert_close(mixed, tiny.oracle(DATA, *parts))
    count = len(DATA.feeds["x"])
    rows = session.run(None, DATA.feeds, adapter=[{"a": {"up": 0.25}}, *["b"] * (count - 1)])[0]
    assert_close(rows[0], tiny.oracle(DATA, (weighed(a, {"layer.up": 0.25}), 1.0))[0])
    assert_close(rows[1:], tiny.oracle(DATA, (b, 1.0))[1:])


def test_equal_strengths_are_composed_once(package) -> None:
    session = open_session(package)
    for strength in ({"up": 0.25, "q": 2}, {"q": 2.0, "up": 0.25, "*": 1}, {"q": 2.0, "up.": 0.25}):
        session.run(None, DATA.feeds, adapter={"a": strength})
    assert len(session._store._composed) == 1


@pytest.mark.parametrize(
    "strength, message",
    [
        ({}, "must be a number, or numbers by groups of modules, and is empty"),
        ({"up": "much"}, "'up' has 'much'"),
        ({"up": float("nan")}, "'up' has nan"),
        ({3: 1.0}, "has a group 3"),
        ({"": 1.0}, "has a group ''"),
        ({"down_blocks": 0.5}, "no module of it is in a group 'down_blocks'; parts of their names are layer"),
        ({"ayer": 0.5}, "no module of it is in a group 'ayer'"),
        ({"layer": 0.5, "up": 1.0}, "layer.up: is in the groups 'layer' and 'up', of different weights"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(package, strength, message) -> None:
    session = open_session(package)
    with pytest.raises(SelectionError) as caught:
        session.run(None, DATA.feeds, adapter={"a": strength})
    assert message in str(caught.value)
    with pytest.raises(SelectionError):
        blend([(session.adapters["a"], strength)])


def test_a_whole_weight_has_no_half_in_a_group_either(package) -> None:
    session = open_session(package)
    session.load_adapter("own", tiny.adapter("own", 7, labels=3))
    with pytest.raises(SelectionError, match=r"score\.weight: a whole weight must come from one adapter of weight 1"):
        session.run(None, DATA.feeds, adapter={"own": {"score": 0.5}})
    whole = session.run(None, DATA.feeds, adapter={"own": {"layer": 0.5}})[0]
    own = weighed(session.adapters["own"], {"layer.q": 0.5, "layer.k": 0.5, "layer.up": 0.5})
    assert_close(whole, tiny.oracle(DATA, (own, 1.0)))


def test_a_folded_model_says_its_groups(package, tmp_path) -> None:
    pytest.importorskip("onnx")
    own = open_session(package).adapters["a"]
    fold_to(package, [(own, {"up": 0.25, "*": 2})], tmp_path / "folded")
    model = read_folded(tmp_path / "folded")
    assert model is not None
    assert (model.adapters[0].weight, dict(model.adapters[0].groups)) == (2.0, {"up": 0.25})


def test_a_number_stays_a_number() -> None:
    assert as_strength({"*": 0.5}) == 0.5
    assert weight_in(as_strength(2), "x") == 2.0
