"""How tokens are chosen: transformers' processors are the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from onnx_lora import Sampling, TextGenerator
from onnx_lora.errors import RunError, SamplingError
from onnx_lora.runtime.generation.sampling import Chooser, distribution, penalize
from tests.support.numbers import assert_close

PROMPT = [5, 17, 42, 8]


def _logits(size: int, seed: int, *, steps: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 4
    # In steps, so that many are equal.
    return np.round(values / steps).astype(np.float32) * np.float32(steps) if steps else values


@pytest.mark.parametrize("size, steps", [(7, 0.0), (100, 0.0), (5000, 0.0), (5000, 0.5), (49152, 0.0)])
@pytest.mark.parametrize(
    "temperature, top_k, top_p", list(itertools.product([0.3, 1.0, 2.5], [0, 1, 40], [1.0, 0.9, 0.2]))
)
def test_probabilities_are_transformers(size: int, steps: float, temperature: float, top_k: int, top_p: float) -> None:
    logits = _logits(size, seed=size, steps=steps)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    # Which of equal scores the nucleus keeps depends on how they are sorted.
    if top_p < 1.0 and not steps:
        warpers.append(TopPLogitsWarper(top_p))
    scores = torch.from_numpy(logits)[None]
    for warper in warpers:
        scores = warper(None, scores)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=1.0 if steps else top_p)
    ids, chances = distribution(logits, sampling)
    found = np.zeros(size, np.float32)
    found[ids] = chances
    expected = scores.softmax(dim=-1)[0].numpy()
    assert np.array_equal(found > 0, expected > 0) or (not top_k and top_p == 1.0)
    assert_close(found, expected)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    logits, seen = _logits(50, 3), [4, 9, 9, 30]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])
    assert_close(penalize(logits.copy(), np.unique(seen), penalty), expected[0].numpy())


def test_tokens_are_drawn_as_often_as_they_should() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    chooser = Chooser(Sampling(temperature=1.0, seed=1), 0, [])
    counts = np.bincount([chooser.choose(logits) for _ in range(20000)], minlength=4) / 20000
    assert np.abs(counts - np.exp(logits)).max() < 0.015


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Chooser(Sampling(), 0, []).choose(np.array([1, 3, 3, 2], np.float32)) == 1


def test_half_precision_is_chosen_from_as_float32() -> None:
    logits = _logits(100, 1).astype(np.float16)
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=1), Sampling(repetition_penalty=1.2)):
        found = Chooser(sampling, 0, [3, 5]).choose(logits)
        assert found == Chooser(sampling, 0, [3, 5]).choose(logits.astype(np.float32))


def test_a_seed_gives_the_same_text_whatever_the_neighbours(generator: TextGenerator) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.5, seed=7, ignore_eos=True)
    batch = generator.generate([PROMPT, [9, 50]], adapter=["a", None], sampling=sampling)
    assert generator.generate(PROMPT, adapter="a", sampling=sampling).tokens == batch[0].tokens
    other = generator.generate([PROMPT, [9, 50]], adapter=["b", None], sampling=sampling)
    assert other[1].tokens == batch[1].tokens
    rows = generator.generate([PROMPT, PROMPT], sampling=sampling)
    assert rows[0].tokens != rows[1].tokens, "every row draws its own numbers"
    unseeded = Sampling(max_tokens=20, temperature=1.5, ignore_eos=True)
    assert len({generator.generate(PROMPT, sampling=unseeded).tokens for _ in range(3)}) > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 2])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float, top_k: int) -> None:
    logits = _logits(300, 0)
    logits[200] = bad
    with pytest.raises(RunError, match="logits must be numbers"):
        Chooser(Sampling(temperature=temperature, top_k=top_k), 0, []).choose(logits)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number, 1 or more; it is 0"),
        ({"max_tokens": 1.5}, "max_tokens must be"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
        ({"seed": -1}, "seed must be"),
        ({"stop": ("",)}, "stop must be texts"),
        ({"stop": 7}, "stop must be texts"),
        ({"stop": None}, "stop must be texts"),
        ({"max_tokens": -(10**400)}, "it is a number of 1329 bits"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"temperature": 1e300}, "temperature must be"),  # infinite in float32
        ({"temperature": 1e-300}, "temperature must be"),  # zero in float32
        ({"temperature": "hot"}, "temperature must be 0 .greedy., or from 1e-30 to 1e.30; it is 'hot'"),
        ({"top_p": 10**400}, "top_p must be"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty must be"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        Sampling(**setting)


def test_all_settings_out_of_range_are_named_at_once() -> None:
    with pytest.raises(SamplingError) as caught:
        Sampling(max_tokens=-1, top_p=7.0)
    assert len(caught.value.problems) == 2
