"""Kept caches: to go on with is to have written one longer text; and whose they are."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from onnx_lora import Sampling, TextGenerator
from onnx_lora.errors import CacheError, SelectionError
from tests.generation.conftest import Decoder, expected, open_generator

PROMPT = [5, 17, 42, 8]
SOME = Sampling(max_tokens=12, ignore_eos=True)


def _kept(generator: TextGenerator, adapter: Any = "a", prompt: Any = PROMPT) -> Any:
    return generator.generate(prompt, adapter=adapter, sampling=SOME, keep_cache=True)


@pytest.mark.parametrize("more", [[33], [33, 9, 71, 20, 4], []])
def test_going_on_is_one_longer_prompt(generator: TextGenerator, decoder: Decoder, more: list[int]) -> None:
    first = _kept(generator)
    second = generator.generate(more, adapter="a", sampling=SOME, cache=first.cache, keep_cache=True)
    prompt = [*PROMPT, *first.tokens, *more]
    assert list(second.tokens) == expected(decoder.model("a"), prompt, 12)
    assert second.prompt_tokens == len(prompt)
    third = generator.generate([7], adapter="a", sampling=SOME, cache=second.cache)
    assert list(third.tokens) == expected(decoder.model("a"), [*prompt, *second.tokens, 7], 12)


def test_a_batch_goes_on_row_by_row(generator: TextGenerator) -> None:
    """Rows of different lengths, adapters, and continuations; one of them empty."""
    prompts, choices, more = [PROMPT, [9], [3, 4, 5]], ["a", None, {"b": 0.5}], [[5, 6, 7], [], [9]]
    first = _kept(generator, choices, prompts)
    cache = first[0].cache
    assert all(row.cache is cache for row in first)
    second = generator.generate(more, adapter=choices, sampling=SOME, cache=cache)
    for row, found in enumerate(second):
        prompt = [*prompts[row], *first[row].tokens, *more[row]]
        assert found == generator.generate(prompt, adapter=choices[row], sampling=SOME)


def test_a_row_that_ended_early_goes_on_from_its_end(generator: TextGenerator) -> None:
    prompts = ["the cat", [9], "hat"]
    free = generator.generate(prompts, sampling=SOME)
    stop = free[0].text[3:5]
    sampling = Sampling(max_tokens=12, ignore_eos=True, stop=stop)
    first = generator.generate(prompts, sampling=sampling, keep_cache=True)
    assert first[0].reason == "stop_string"
    assert len(first[0].tokens) < 12
    more = [[5, 6], [7], [8]]
    second = generator.generate(more, sampling=SOME, cache=first[0].cache)
    for row, found in enumerate(second):
        ids = [*(generator.encode(prompts[row]) if isinstance(prompts[row], str) else prompts[row])]
        assert found == generator.generate([*ids, *first[row].tokens, *more[row]], sampling=SOME)


def test_text_behind_a_cache_gets_no_start_token(generator: TextGenerator) -> None:
    first = generator.generate("the", sampling=SOME, keep_cache=True)
    tokens = first.cache.tokens[0]
    second = generator.generate(" cat", sampling=SOME, cache=first.cache)
    assert second.prompt_tokens == len(tokens) + len(generator.encode(" cat")) - 1


def test_a_stream_leaves_a_cache_at_its_end(generator: TextGenerator) -> None:
    stream = generator.stream(PROMPT, adapter="a", sampling=SOME, keep_cache=True)
    next(stream)
    assert stream.results[0].cache is None
    tokens = [piece.token for piece in stream]
    assert len(tokens) == 11
    cache = stream.results[0].cache
    assert cache.adapter == "'a'"
    assert cache.tokens == ((*PROMPT, *stream.results[0].tokens),)


def test_a_cache_is_used_once_and_its_copy_once_more(generator: TextGenerator) -> None:
    cache = _kept(generator).cache
    copy = cache.copy()
    first = generator.generate([7], adapter="a", sampling=SOME, cache=cache, keep_cache=True)
    other = generator.generate([33, 9], adapter="a", sampling=SOME, cache=copy, keep_cache=True)
    assert other.tokens != first.tokens
    again = generator.generate([50], adapter="a", sampling=SOME, cache=first.cache)
    assert again == generator.generate([*first.cache.tokens[0], 50], adapter="a", sampling=SOME), (
        "untouched by the copy"
    )
    for use in (cache.copy, lambda: generator.generate([7], adapter="a", cache=cache)):
        with pytest.raises(CacheError, match="can be gone on with once"):
            use()


def test_a_call_that_is_refused_leaves_the_cache_usable(generator: TextGenerator) -> None:
    cache = _kept(generator).cache
    for prompt, options in (([7], {"adapter": "b"}), ([-1], {"adapter": "a"}), ([7], {"adapter": "unknown"})):
        with pytest.raises(Exception, match=r"."):
            generator.generate(prompt, cache=cache, **options)
    generator.generate([7], adapter="a", cache=cache, sampling=SOME)


@pytest.mark.parametrize(
    "filled, asked, message",
    [
        ("a", "b", "filled by 'a', and 'b' was asked for"),
        ("a", None, "filled by 'a', and the base was asked for"),
        (None, "a", "filled by the base, and 'a' was asked for"),
        ("a", {"a": 0.5}, "filled by 'a', and 'a' at 0.5 was asked for"),
        ({"a": 0.5, "b": 1}, {"a": 1, "b": 0.5}, "filled by 'a' at 0.5 and 'b', and 'a' and 'b' at 0.5 was asked for"),
    ],
)
def test_a_cache_belongs_to_the_adapter_that_filled_it(
    generator: TextGenerator, filled: Any, asked: Any, message: str
) -> None:
    cache = _kept(generator, filled).cache
    with pytest.raises(CacheError, match=message):
        generator.generate([7], adapter=asked, cache=cache)
    generator.generate([7], adapter=asked, cache=cache, sampling=SOME, allow_other_adapter=True)


def test_a_cache_of_rows_belongs_to_their_adapters(generator: TextGenerator) -> None:
    cache = _kept(generator, ["a", None], [PROMPT, PROMPT])[0].cache
    with pytest.raises(CacheError, match="rows of 'a', the base, and rows of the base, 'a'"):
        generator.generate([[1], [2]], adapter=[None, "a"], cache=cache)
    generator.generate([[1], [2]], adapter=["a", None], cache=cache, sampling=SOME)


def test_an_adapter_unloaded_is_named_and_one_loaded_again_is_another(
    generator: TextGenerator, decoder: Decoder
) -> None:
    cache = _kept(generator).cache
    generator.unload_adapter("a")
    with pytest.raises(SelectionError, match="no adapter 'a' is loaded"):
        generator.generate([7], adapter="a", cache=cache)
    generator.load_adapter("a", decoder.adapters["a"])
    with pytest.raises(CacheError, match="unloaded since, and loaded again"):
        generator.generate([7], adapter="a", cache=cache)


def test_a_cache_keeps_no_adapter_alive(generator: TextGenerator) -> None:
    cache = _kept(generator, {"a": 0.5, "b": 0.5}).cache
    loaded = [weakref.ref(generator.session._store.loaded[name]) for name in "ab"]
    generator.unload_adapter("a")
    generator.unload_adapter("b")
    gc.collect()
    assert [each() for each in loaded] == [None, None]
    assert cache.adapter == "'a' at 0.5 and 'b' at 0.5"


def test_a_cache_of_another_generator_or_another_number_of_rows_is_refused(
    generator: TextGenerator, decoder: Decoder
) -> None:
    cache = _kept(generator).cache
    with pytest.raises(CacheError, match="another one"):
        open_generator(decoder, "a").generate([7], adapter="a", cache=cache)
    with pytest.raises(CacheError, match="holds 1 rows, and 2 were given"):
        generator.generate([[7], [8]], adapter="a", cache=cache)
