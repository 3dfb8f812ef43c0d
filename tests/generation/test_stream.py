"""Streams: the same text as all at once, stop strings, adapters unloaded meanwhile, and what a stream leaves behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import defaultdict
from typing import Any

import pytest

from onnx_lora import Chat, Sampling, TextGenerator
from onnx_lora.errors import SelectionError
from tests.generation.conftest import Decoder, open_generator

PROMPT = [5, 17, 42, 8]
LONG = Sampling(max_tokens=40, ignore_eos=True)


def _texts(generator: TextGenerator, prompt: Any, **options: Any) -> tuple[dict[int, str], list[Any]]:
    texts: dict[int, str] = defaultdict(str)
    stream = generator.stream(prompt, **options)
    for piece in stream:
        texts[piece.row] += piece.text
    return texts, stream.results


def test_pieces_are_the_text(generator: TextGenerator) -> None:
    prompts = ["the cat", "a€ 😀", "é"]
    for sampling in (LONG, Sampling(max_tokens=60, temperature=2.0, seed=3, ignore_eos=True)):
        whole = generator.generate(prompts, adapter=["a", None, "b"], sampling=sampling)
        texts, results = _texts(generator, prompts, adapter=["a", None, "b"], sampling=sampling)
        assert [texts[row] for row in range(3)] == [result.text for result in whole]
        assert results == whole


def test_the_text_is_what_the_tokens_decode_to_behind_the_prompt(generator: TextGenerator, decoder: Decoder) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(decoder.package / "tokenizer.json"))
    for seed in range(5):
        sampling = Sampling(max_tokens=50, temperature=1.5, seed=seed, ignore_eos=True)
        found = generator.generate("the cat", sampling=sampling)
        prompt = generator.encode("the cat")
        whole = tokenizer.decode([*prompt, *found.tokens])
        assert prompt[0] == 1, "the tokenizer's own start token"
        assert found.text == whole.removeprefix("the cat")


def test_every_token_is_a_piece_and_the_last_says_why(generator: TextGenerator) -> None:
    pieces = list(generator.stream(PROMPT, sampling=LONG))
    assert [piece.token for piece in pieces] == list(generator.generate(PROMPT, sampling=LONG).tokens)
    assert [piece.reason for piece in pieces] == [None] * 39 + ["length"]


def test_a_stop_string_over_token_borders_ends_the_text(generator: TextGenerator) -> None:
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True)
    free = generator.generate("the", sampling=sampling)
    stop = free.text[9:13]
    place = free.text.index(stop)
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True, stop=("never", stop))
    found = generator.generate("the", sampling=sampling)
    assert (found.text, found.reason) == (free.text[:place], "stop_string")
    assert found.tokens == free.tokens[: len(found.tokens)]
    texts, results = _texts(generator, ["the", PROMPT], sampling=sampling)
    assert texts[0] == found.text
    assert results[0].reason == "stop_string"


def test_an_adapter_unloaded_meanwhile_is_used_to_the_end(generator: TextGenerator) -> None:
    expected = generator.generate(PROMPT, adapter="a", sampling=LONG)
    stream = generator.stream(PROMPT, adapter="a", sampling=LONG)
    next(stream)
    generator.unload_adapter("a")
    for _ in stream:
        pass
    assert stream.results == [expected]
    with pytest.raises(SelectionError, match="no adapter 'a' is loaded"):
        generator.generate(PROMPT, adapter="a", sampling=LONG)


def test_a_stream_checks_before_it_starts(generator: TextGenerator) -> None:
    with pytest.raises(SelectionError):
        generator.stream(PROMPT, adapter="c")


@pytest.mark.parametrize("how", ["close", "break", "with", "error", "end", "drop"])
def test_a_stream_left_early_frees_everything(how: str, generator: TextGenerator) -> None:
    watched = _leave(generator, how)
    gc.collect()
    assert [name for name, reference in watched.items() if reference() is not None] == []


def _leave(generator: TextGenerator, how: str) -> dict[str, weakref.ref[Any]]:
    """What a stream needs, watched; the adapter is unloaded, so that nobody else has it."""
    generator.load_adapter("gone", generator.adapters["a"])
    stream = generator.stream([PROMPT, PROMPT], adapter=["gone", None], sampling=LONG)
    work = stream._pieces.gi_frame.f_locals["work"]
    loaded = generator.session._store.loaded["gone"]
    watched = {"held": work.lease, "memory": work.memory, "value": next(iter(work.lease.values.values()))}
    references = {name: weakref.ref(value) for name, value in watched.items()}
    references["loaded"] = weakref.ref(loaded)
    del work, watched, loaded
    generator.unload_adapter("gone")
    next(stream)
    references["decoder"] = weakref.ref(stream._pieces.gi_frame.f_locals["decoder"])
    tensors = stream._pieces.gi_frame.f_locals["work"].memory
    first = getattr(tensors, "_buffers", None) or tensors._past
    references["tensor"] = weakref.ref(first[0])
    del tensors, first
    if how == "close":
        stream.close()
        assert list(stream) == []
        assert stream.results[0].reason is None
        generator.kept_by_the_test = stream  # a closed stream that somebody holds holds nothing itself
    elif how == "break":
        for _ in stream:
            break
    elif how == "with":
        with stream:
            next(stream)
    elif how == "error":
        with pytest.raises(ZeroDivisionError), stream:
            raise ZeroDivisionError
    elif how == "end":
        for _ in stream:
            pass
    return references


def test_threads_with_different_adapters_do_not_disturb_each_other(decoder: Decoder) -> None:
    generator = open_generator(decoder, "a", "b")
    choices: list[Any] = [None, "a", "b", {"a": 0.5, "b": 0.5}]
    sampling = Sampling(max_tokens=48, ignore_eos=True)
    expected = [generator.generate("the cat", adapter=choice, sampling=sampling) for choice in choices]
    found: dict[int, list[Any]] = defaultdict(list)

    def work(index: int) -> None:
        for _ in range(4):
            found[index].append(generator.generate("the cat", adapter=choices[index], sampling=sampling))

    def load() -> None:
        for round_ in range(20):
            generator.load_adapter(f"extra{round_}", decoder.adapters["a"])
            generator.unload_adapter(f"extra{round_}")

    threads = [threading.Thread(target=work, args=[index]) for index in range(4)] + [threading.Thread(target=load)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {index: [expected[index]] * 4 for index in range(4)} == dict(found)


def test_a_chat_is_written_as_its_template_says(generator: TextGenerator) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    tokens = generator.encode(Chat(messages))
    assert tokens == generator.encode("<|user|>the cat\nthe "), "one start token, the template's"
    assert generator.chat(messages, adapter="a", sampling=LONG) == generator.generate(
        tokens, adapter="a", sampling=LONG
    )
    batch = generator.generate([Chat(messages), "the cat"], adapter="a", sampling=LONG)
    assert batch[0] == generator.chat(messages, adapter="a", sampling=LONG)
