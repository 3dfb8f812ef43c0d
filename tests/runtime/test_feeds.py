"""Feeds and outputs that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_lora.errors import FeedError, RunError
from onnx_lora.runtime._ort import make_fed_value
from tests.runtime import tiny
from tests.support.numbers import assert_same_bits

GOOD = tiny.batch().feeds


def changed(**feeds: Any) -> dict[str, Any]:
    return {name: value for name, value in {**GOOD, **feeds}.items() if value is not None}


@pytest.mark.parametrize(
    "feeds, message",
    [
        (changed(mask=None), "mask is missing; expected mask: int64 [batch, seq]"),
        (changed(y=GOOD["x"]), "'y' is no input of this graph"),
        (changed(x=GOOD["x"].astype("float64")), "x must be float32, and is float64"),
        (changed(x=GOOD["x"].astype(">f4")), "x must be float32, and is >f4"),
        (changed(mask=GOOD["mask"].astype("int32")), "mask must be int64, and is int32"),
        (changed(x=GOOD["x"][0]), "x must have 3 axes, and has 2: [5, 8]"),
        (changed(x=GOOD["x"][:, :, :7]), "x must have the shape x: float32 [batch, seq, 8], and has [2, 5, 7]"),
        (changed(x=GOOD["x"].tolist()), "x must be a numpy array, and is a list"),
        (changed(x=3.0), "x must be a numpy array, and is a float"),
        ([GOOD["x"]], "must map input names to arrays"),
        (None, "must map input names to arrays"),
    ],
)
def test_what_does_not_fit_is_refused(session, feeds, message):
    with pytest.raises(FeedError) as caught:
        session.run(None, feeds)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["layer.q.lora_A.weight", "score.weight"])
def test_an_adapters_input_cannot_be_fed_by_hand(session, name):
    with pytest.raises(FeedError, match=f"{name} is filled by the adapter"):
        session.run(None, {**GOOD, name: np.zeros((1, 8, 2), "f")})


def test_all_problems_are_listed_at_once(session):
    with pytest.raises(FeedError, match="inputs are x, mask") as caught:
        session.run(None, {"x": 1, "y": 2})
    assert len(caught.value.problems) == 3


def test_lengths_that_do_not_go_together_fail_in_the_run(session):
    with pytest.raises(RunError, match="ONNX Runtime failed in the run"):
        session.run(None, changed(mask=np.ones((2, 4), np.int64)))


@pytest.mark.parametrize("names", ["logits", 3])
def test_output_names_must_be_a_list(session, names):
    with pytest.raises(FeedError, match="must be a list of names"):
        session.run(names, GOOD)


def test_unknown_outputs_are_refused(session):
    with pytest.raises(FeedError, match=r"outputs are logits, up_all\n  - 'hidden'"):
        session.run(["logits", "hidden"], GOOD)


def test_outputs_come_in_the_order_asked_for(session):
    logits, up = session.run(None, GOOD)
    turned = session.run(["up_all", "logits"], GOOD)
    assert_same_bits(turned[0], up)
    assert_same_bits(turned[1], logits)


def test_no_output_names_mean_all(session):
    assert len(session.run([], GOOD)) == 2


def test_strided_arrays_are_read_as_they_look(session):
    turned = np.asfortranarray(GOOD["x"])
    assert_same_bits(session.run(None, changed(x=turned))[0], session.run(None, GOOD)[0])


def test_ortvalues_may_be_fed(session):
    fed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in GOOD.items()}
    assert_same_bits(session.run(None, fed, adapter=["a", "b"])[0], session.run(None, GOOD, adapter=["a", "b"])[0])


def test_an_ortvalue_of_another_type_is_refused(session):
    wide = onnxruntime.OrtValue.ortvalue_from_numpy(GOOD["x"].astype("float64"))
    with pytest.raises(FeedError, match=r"x must be float32, and is tensor\(double\)"):
        session.run(None, changed(x=wide))


def test_run_options_are_passed_on(session):
    options = onnxruntime.RunOptions()
    options.terminate = True
    with pytest.raises(RunError, match="terminate"):
        session.run(None, GOOD, options)


def test_an_empty_batch_gives_empty_outputs(session):
    data = tiny.batch(rows=0)
    assert session.run(["up_all"], data.feeds, adapter="a")[0].shape == (0, 5, 8)


@pytest.mark.parametrize(
    "value, element",
    [
        (np.array(3, "float32"), 1),
        (np.array(2, "int64"), 7),
        (np.array([True, False]), 9),
        (np.arange(6, dtype="float16").reshape(2, 3).T, 10),
        (np.arange(12, dtype="float64").reshape(3, 4)[::2, ::-1], 11),
        (np.zeros((0, 3), "uint8"), 2),
    ],
)
def test_an_ortvalue_holds_what_the_array_shows(value, element):
    back = make_fed_value(value, element).numpy()
    assert back.shape == value.shape
    assert_same_bits(np.ascontiguousarray(back), np.ascontiguousarray(value))
