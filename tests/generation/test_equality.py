"""What is written is what transformers and PEFT write, token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from peft import PeftModel

from onnx_lora import Sampling, TextGenerator
from onnx_lora.exporter import export
from tests.generation.conftest import FAMILIES, Decoder, Make, expected, open_generator
from tests.support.exporters import VIA
from tests.support.llama2c import read_model, read_tokens
from tests.support.models import make_adapter

TOKENS = 64
PROMPTS = [[5, 17, 42, 8, 61, 30, 77], [9, 50], [90, 33, 21, 64]]
ENDLESS = Sampling(max_tokens=TOKENS, ignore_eos=True)


@pytest.mark.parametrize("name, family", FAMILIES)
def test_greedy_text_is_transformers_and_pefts(name: str, family: str, decoders_of: Make) -> None:
    decoder = decoders_of(name, family)
    generator = open_generator(decoder, "a")
    texts = []
    for adapter in (None, "a"):
        found = generator.generate(PROMPTS[0], adapter=adapter, sampling=ENDLESS)
        assert list(found.tokens) == expected(decoder.model(adapter), PROMPTS[0], TOKENS), adapter
        assert (found.prompt_tokens, found.reason) == (len(PROMPTS[0]), "length")
        texts.append(found.tokens)
    assert texts[0] != texts[1], "the adapter must be seen"
    assert all(len(set(tokens)) > 20 for tokens in texts), "a text that repeats itself shows little"


@pytest.mark.parametrize("name, family", FAMILIES)
def test_rows_of_a_batch_are_single_runs(name: str, family: str, decoders_of: Make) -> None:
    """Prompts of different lengths, each with a choice of its own."""
    generator = open_generator(decoders_of(name, family), "a", "b")
    choices: list[Any] = [None, "a", {"a": 0.5, "b": 0.7}]
    batch = generator.generate(PROMPTS, adapter=choices, sampling=ENDLESS)
    single = [
        generator.generate(prompt, adapter=choice, sampling=ENDLESS)
        for prompt, choice in zip(PROMPTS, choices, strict=True)
    ]
    assert [row.tokens for row in batch] == [each.tokens for each in single]
    same = generator.generate(PROMPTS, adapter="b", sampling=ENDLESS)
    assert [row.tokens for row in same] == [
        generator.generate(prompt, adapter="b", sampling=ENDLESS).tokens for prompt in PROMPTS
    ]


def test_the_end_token_ends_a_row_and_leaves_the_others(decoder: Decoder, generator: TextGenerator) -> None:
    free = [generator.generate(prompt, sampling=ENDLESS).tokens for prompt in PROMPTS]
    end = free[0][10]
    generator._settings = _ending(generator._settings, end)
    batch = generator.generate(PROMPTS, sampling=Sampling(max_tokens=TOKENS))
    for row, tokens in zip(batch, free, strict=True):
        place = tokens.index(end) + 1 if end in tokens else TOKENS
        assert row.tokens == tokens[:place]
        assert row.reason == ("stop" if end in tokens else "length")
    assert batch[0].reason == "stop"
    assert list(batch[0].tokens) == expected(decoder.model(), PROMPTS[0], TOKENS, eos_token_id=end)


def _ending(settings: Any, token: int) -> Any:
    from dataclasses import replace

    return replace(settings, end=frozenset([token]))


def test_repetition_penalty_is_transformers(decoder: Decoder, generator: TextGenerator) -> None:
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True, repetition_penalty=1.3)
    found = generator.generate(PROMPTS, sampling=sampling)
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert list(row.tokens) == expected(decoder.model(), prompt, TOKENS, repetition_penalty=1.3)


def test_a_long_prompt_goes_in_pieces(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [(index * 37) % 97 + 3 for index in range(100)]
    whole = generator.generate(prompt, adapter="a", sampling=ENDLESS).tokens
    for module in ("growing", "shared"):
        monkeypatch.setattr(f"onnx_lora.runtime.generation.{module}._PIECE", 7)
    assert generator.generate(prompt, adapter="a", sampling=ENDLESS).tokens == whole


def test_a_batch_may_end_at_the_context(decoder: Decoder, generator: TextGenerator) -> None:
    """The shorter row goes on, behind columns that only the longer one fills."""
    prompts = [[(index * 37) % 97 + 3 for index in range(250)], [5, 6, 7]]
    many = Sampling(max_tokens=20, ignore_eos=True)
    batch = generator.generate(prompts, sampling=many)
    assert [len(row.tokens) for row in batch] == [6, 20]
    assert [row.tokens for row in batch] == [generator.generate(prompt, sampling=many).tokens for prompt in prompts]


@pytest.mark.parametrize("name", ["stories260K", "chemts_gpt2_0.5m"])
def test_trained_models_write_as_in_pytorch(name: str, data: Path, tmp_path: Path) -> None:
    base = data / "base" / name
    if not base.is_dir():
        pytest.skip(f"needs the trained model {name}: {base} is not there")
    model: Callable[[], Any]
    if name == "stories260K":
        model, prompt = lambda: read_model(base / "checkpoint_legacy.bin"), _story(base)
    else:
        model, prompt = lambda: hf.GPT2LMHeadModel.from_pretrained(base).eval(), [1, 12, 5]
    model().save_pretrained(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "package", via=VIA, verify=False)
    adapter = make_adapter(model(), tmp_path / "a", r=4, lora_alpha=2, target_modules="all-linear")
    generator = open_generator(Decoder(tmp_path / "checkpoint", tmp_path / "package", {"a": adapter}), "a")
    peft = PeftModel.from_pretrained(model(), adapter).eval()
    for choice, reference in ((None, model()), ("a", peft)):
        found = generator.generate(prompt, adapter=choice, sampling=Sampling(max_tokens=48, ignore_eos=True))
        assert list(found.tokens) == expected(reference, prompt, 48)


def _story(base: Path) -> list[int]:
    return read_tokens(base / "tokenizer.bin").encode("Once upon a time, there was a boy named Tim.")
