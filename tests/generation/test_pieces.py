"""Text that comes piece by piece: whole characters, and nothing that may still become a stop string."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from onnx_lora.runtime.generation.pieces import RunningText, StopFilter
from onnx_lora.runtime.generation.text import TextTokenizer
from tests.generation.conftest import byte_tokenizer, fallback_tokenizer

TEXTS = ["the cat, the hat", "a€b 😀 é!", "€€😀😀", " leading", "ñ", "the\n\n the "]


def _written(tokenizer: Tokenizer, tokens: list[int], prompt: list[int]) -> list[str]:
    running = RunningText(TextTokenizer(tokenizer).decode, prompt)
    return [*(running.push(token) for token in tokens), running.finish()]


@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_what_the_whole_adds_to_the_prompt(make, text: str) -> None:
    tokenizer = make()
    for prompt_text in ("", "hello", "hello "):
        prompt = _encode(tokenizer, prompt_text)
        tokens = _encode(tokenizer, text)
        whole = tokenizer.decode(prompt + tokens)
        pieces = _written(tokenizer, tokens, prompt)
        assert "".join(pieces) == whole[len(tokenizer.decode(prompt)) :]
        assert not any("�" in piece for piece in pieces)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Without the prefix space that SentencePiece puts before a text's first word."""
    if tokenizer.token_to_id("▁") is not None:
        text = text.replace(" ", "▁")
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_a_space_before_the_first_word_is_kept() -> None:
    """SentencePiece's decoder drops it from a text that begins so; behind a prompt it belongs there."""
    tokenizer = fallback_tokenizer()
    tokens = [tokenizer.token_to_id(piece) for piece in ("▁hello", "▁a")]
    assert "".join(_written(tokenizer, tokens, [tokens[0]])) == " hello a"
    assert "".join(_written(tokenizer, tokens, [])) == "hello a"


def test_special_tokens_say_nothing_and_take_no_space_away() -> None:
    tokenizer = fallback_tokenizer()
    hello, special, a = (tokenizer.token_to_id(piece) for piece in ("▁hello", "</s>", "▁a"))
    assert "".join(_written(tokenizer, [hello, special, a], [])) == "hello a"


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    broken = tokenizer.encode("€", add_special_tokens=False).ids[:2]
    assert "".join(_written(tokenizer, broken, [])) == "�"
    tokens = [*tokenizer.encode("a", add_special_tokens=False).ids, *broken]
    assert _written(tokenizer, tokens, [])[0] == "a"


def test_an_incomplete_character_takes_no_whole_one_back() -> None:
    """Byte fallback shows a run of bytes as broken as long as its last character is."""
    tokenizer = fallback_tokenizer()
    euro = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert "".join(_written(tokenizer, euro + euro[:1], [])) == "€�"
    assert "".join(_written(tokenizer, euro + euro, [])) == "€€"


@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer])
def test_random_tokens_lose_nothing(make) -> None:
    """Whatever is decoded later, what was given out stays; and it is what the whole decodes to, wherever that is
    whole characters."""
    tokenizer = make()
    random = np.random.default_rng(0)
    usual = [index for index in range(3, tokenizer.get_vocab_size()) if "<" not in tokenizer.id_to_token(index)]
    for _ in range(200):
        tokens = [int(token) for token in random.choice(usual, 12)]
        written = "".join(_written(tokenizer, tokens, []))
        assert written == tokenizer.decode(tokens)


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("ababac", ["abac"], "ab"),
        ("aaab", ["aab"], "a"),
        ("one tw", ["two"], "one tw"),
        ("one", [], "one"),
        ("a\n\nb", ["\n\n"], "a"),
    ],
)
def test_a_stop_string_is_cut_off_wherever_tokens_end(text: str, stops: list[str], expected: str, cut: int) -> None:
    stop = StopFilter(stops)
    pieces = [stop.push(text[start : start + cut]) for start in range(0, len(text), cut)]
    assert "".join(pieces) + stop.finish() == expected
    assert stop.stopped == any(each in text for each in stops)
    assert not any(each in "".join(pieces) for each in stops)
