"""Expressions of others have `re`'s answers, and never more than their share of time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lora.expressions import Expression, ExpressionError, Work

ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "q", "", "^", "$", r"\b", r"(?<=a)"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = inner.map("(?:{})".format)
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(group, st.sampled_from(["*", "+", "?", "*?", "{1,2}", "{2}", "{0,3}?"])).map("".join),
        inner.map("(?={})".format),
        inner.map("(?!{})".format),
        inner.map("(?i:{})".format),
    )


@settings(max_examples=400, deadline=None)
@given(text=st.recursive(ATOMS, larger, max_leaves=6), name=st.text("abq.1A\n", max_size=7))
def test_answers_are_those_of_re(text: str, name: str) -> None:
    theirs, ours = re.compile(text), Expression(text)
    assert ours.fullmatch(name) == (theirs.fullmatch(name) is not None)
    assert ours.match(name) == (theirs.match(name) is not None)


@pytest.mark.parametrize(
    "text, name, whole",
    [
        (r".*language_model.*\.(q_proj|v_proj)", "model.language_model.layers.0.q_proj", True),
        (r".*language_model.*\.(q_proj|v_proj)", "model.vision.layers.0.q_proj", False),
        (r"^(?!.*patch_embed).*(?:linear|self_attn).*", "vision.blocks.0.self_attn.q", True),
        (r"^(?!.*patch_embed).*(?:linear|self_attn).*", "vision.patch_embed.linear", False),
        (r"model\.layers\.(1\d|2[0-3])\..*(?<!gate)_proj", "model.layers.21.mlp.up_proj", True),
        (r"model\.layers\.(1\d|2[0-3])\..*(?<!gate)_proj", "model.layers.21.mlp.gate_proj", False),
    ],
)
def test_expressions_as_people_write_them(text: str, name: str, whole: bool) -> None:
    assert Expression(text).fullmatch(name) is whole


def test_the_places_where_a_match_can_end() -> None:
    assert Expression("a+").ends("baaab", 1) == [2, 3, 4]
    assert Expression("a+").ends("baaab", 0) == []


@pytest.mark.parametrize(
    "text",
    ["(a+)+b", "(a*)*b", "(a|a)*b", "(.*)*" * 5 + "b", "(?:a{0,60000}){0,60000}b", "(((((a*)*)*)*)*)*b", "(?=(a+)+b)a"],
)
def test_what_takes_re_forever_takes_no_time(text: str) -> None:
    begin = time.perf_counter()
    assert not Expression(text).fullmatch("a" * 900 + "!")
    assert time.perf_counter() - begin < 5  # seconds


@pytest.mark.parametrize(
    "text, words",
    [
        ("(", "no regular expression"),
        ("(?<=a*)b", "no regular expression"),
        ("(" * 5000 + ")" * 5000, "no regular expression"),
        ("a" * 20_001, "20001 characters"),
        (r"(a)\1", "a reference to a group"),
        (r"(a)?(?(1)b|c)", "a condition on a group"),
        ("a++", "a possessive repetition"),
        ("(?>a)", "an atomic group"),
    ],
)
def test_what_is_no_expression_or_has_no_bound_is_refused(text: str, words: str) -> None:
    with pytest.raises(ExpressionError, match=re.escape(words)):
        Expression(text)


def test_all_expressions_of_a_file_share_one_budget() -> None:
    work = Work(1000)
    one, other = Expression("(?:a|aa)*b", work), Expression("(?:c|cc)*d", work)
    assert not one.fullmatch("a" * 50)
    work.spend(work.left)
    with pytest.raises(ExpressionError, match="too many steps"):
        other.fullmatch("c" * 50)


def test_names_after_one_another_do_not_mix() -> None:
    first, second = Expression("a.c", work := Work()), Expression("b?c", work)
    assert [first.fullmatch("abc"), second.fullmatch("abc"), first.fullmatch("bc"), second.fullmatch("bc")] == [
        True,
        False,
        False,
        True,
    ]
