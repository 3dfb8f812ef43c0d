"""Choices that cannot be had."""

from __future__ import annotations

import pytest

from onnx_lora.errors import SelectionError
from onnx_lora.runtime.selection import Selection, explain_unknown, parse
from tests.runtime import tiny

LOADED = {"sql", "polite"}


def test_each_kind_of_choice():
    assert parse(None, LOADED) == Selection(((),))
    assert parse("sql", LOADED) == Selection(((("sql", 1.0),),))
    assert parse({"sql": 0.5, "polite": 2}, LOADED) == Selection(((("polite", 2.0), ("sql", 0.5)),))
    assert parse(["sql", None], LOADED) == Selection(((("sql", 1.0),), ()), batch=2)
    assert parse(["sql", {"sql": 1}], LOADED) == Selection(((("sql", 1.0),),), batch=2)


@pytest.mark.parametrize(
    "choice, message",
    [
        ("sq", "no adapter 'sq' is loaded; loaded: 'polite', 'sql'"),
        ("zzz", "no adapter 'zzz' is loaded; loaded: 'polite', 'sql'"),
        ({"sql": 1, "x": 1}, "no adapter 'x'"),
        ({"sql": float("nan")}, "finite"),
        ({"sql": float("inf")}, "finite"),
        ({"sql": 10**400}, "finite"),
        ({"sql": "0.5"}, "finite"),
        ({"sql": True}, "finite"),
        ({1: 1.0}, "by name"),
        ({}, "None asks for the base"),
        ([], "is empty"),
        ([["sql"]], "row 0: must be"),
        (3, "must be an adapter's name"),
        ({"sql"}, "must be an adapter's name"),
    ],
)
def test_what_cannot_be_had_is_refused(choice, message):
    with pytest.raises(SelectionError) as caught:
        parse(choice, LOADED)
    assert message in str(caught.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(SelectionError) as caught:
        parse(["x", {"y": 1, "sql": "z"}, "sql"], LOADED)
    assert len(caught.value.problems) == 3


def test_as_many_rows_as_the_batch_has(session):
    with pytest.raises(SelectionError, match=r"3 were given\n  - x has 2 rows\n  - mask has 2 rows"):
        session.run(None, tiny.batch(rows=2).feeds, adapter=["a", "b", None])


def test_equal_rows_must_be_as_many_too(session):
    with pytest.raises(SelectionError, match="3 were given"):
        session.run(None, tiny.batch(rows=2).feeds, adapter=["a", "a", "a"])


def test_two_heads_cannot_be_blended(session):
    session.load_adapter("h", tiny.adapter("h", 3, labels=4))
    session.load_adapter("i", tiny.adapter("i", 4, labels=4))
    with pytest.raises(SelectionError, match=r"score\.weight"):
        session.run(None, tiny.batch().feeds, adapter={"h": 0.5, "i": 0.5})


def test_a_whole_weight_without_rows_cannot_differ_between_them(session):
    session.load_adapter("n", tiny.adapter("n", 3, norm=True))
    with pytest.raises(SelectionError, match=r"norm\.weight"):
        session.run(None, tiny.batch().feeds, adapter=["n", None])


def test_a_message_about_a_blend_uses_the_names_of_the_session(session):
    own = tiny.adapter("its name elsewhere", 3, labels=4)
    session.load_adapter("head", own)
    with pytest.raises(SelectionError, match=r"'head' of weight 0\.5") as caught:
        session.run(None, tiny.batch().feeds, adapter={"head": 0.5})
    assert "elsewhere" not in str(caught.value)


def test_a_wrong_name_among_many_is_told_the_closest_and_how_many_there_are() -> None:
    many = {f"task-{index}" for index in range(200)}
    said = explain_unknown("tsk-17", many)
    assert said == "no adapter 'tsk-17' is loaded; the closest of 200 are 'task-17', 'task-197', 'task-187'"
    assert explain_unknown("x", ()) == "no adapter 'x' is loaded; none is"
