"""Which token comes next: greedily, or drawn by transformers' rules in transformers' order. It knows logits and the
tokens before, no text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnx_lora.boundary import public
from onnx_lora.errors import RunError, SamplingError, printable
from onnx_lora.points import Array

__all__ = ["Chooser", "Sampling", "distribution", "penalize"]

Ids: TypeAlias = Array

# What logits can be divided by, and stay numbers: float32 ends at 3e38.
_LEAST, _MOST = 1e-30, 1e30

# How many scores are looked at together, to find the highest of a vocabulary.
_GROUPED = 64


@public
@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, and when to stop. The default is greedy: the likeliest token, the lowest id among equals.

    `temperature`: 0 is greedy. `top_k`, `top_p`, `repetition_penalty`: as in transformers; 0, 1 and 1 switch them
    off. `seed`: the same seed gives the same text, row by row. `stop`: a text ends before any of these.
    `ignore_eos`: the model's end token ends nothing; for measurements.

    Raises SamplingError: a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # What is no list of texts is refused below.
        is_list = isinstance(self.stop, Iterable) and not isinstance(self.stop, str)
        object.__setattr__(self, "stop", tuple(self.stop) if is_list else (self.stop,))
        is_greedy = _lies_within(self.temperature, 0, 0)
        is_warm = _lies_within(self.temperature, _LEAST, _MOST)
        has_penalty = _lies_within(self.repetition_penalty, _LEAST, _MOST)
        has_share = _lies_within(self.top_p, 0, 1) and self.top_p > 0
        has_seed = self.seed is None or _is_whole(self.seed, 0)
        has_texts = all(isinstance(text, str) and text for text in self.stop)
        rules = {
            "max_tokens must be a whole number, 1 or more": _is_whole(self.max_tokens, 1),
            f"temperature must be 0 (greedy), or from {_LEAST} to {_MOST}": is_greedy or is_warm,
            "top_k must be a whole number, 0 (off) or more": _is_whole(self.top_k, 0),
            "top_p must be above 0, and 1 (off) or less": has_share,
            f"repetition_penalty must be from {_LEAST} to {_MOST}; 1 is off": has_penalty,
            "seed must be a whole number, 0 or more, or None": has_seed,
            "stop must be texts that are not empty": has_texts,
        }
        problems: list[str] = []
        for rule, holds in rules.items():
            if not holds:
                name = rule.partition(" ")[0]
                problems.append(f"{rule}; it is {_describe_value(getattr(self, name))}")
        if problems:
            raise SamplingError("the sampling settings are out of range", problems=problems)

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _lies_within(value: object, least: float, most: float) -> bool:
    """Whether a value is a number from `least` to `most`; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _describe_value(value: object) -> str:
    # Python refuses to write numbers of 4300 digits.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return printable(repr(value), 80, one_line=True)


class Chooser:
    """Chooses one row's tokens. Its random numbers come from the seed and the row, so that a row's text does not
    depend on its neighbours."""

    def __init__(self, sampling: Sampling, row: int, history: Iterable[int]) -> None:
        self._sampling = sampling
        self._random: np.random.Generator | None = None
        # Most texts are greedy, and a generator takes longer to make than a token to choose.
        if sampling.temperature:
            self._random = np.random.default_rng(None if sampling.seed is None else [sampling.seed, row])
        self._penalty = sampling.repetition_penalty
        self._seen = np.unique(np.fromiter(history, np.int64)) if self._penalty != 1.0 else None

    def choose(self, logits: Array) -> int:
        """The next token. `logits`: [vocabulary]. Raises RunError: they are no numbers."""
        if self._seen is not None:
            logits = penalize(logits.astype(np.float32), self._seen, self._penalty)
        if self._random is None:
            token = int(logits.argmax())
            if not math.isfinite(logits[token]):
                raise _make_no_numbers_error()
        else:
            ids, chances = distribution(logits.astype(np.float32, copy=False), self._sampling)
            steps = chances.cumsum(dtype=np.float64)
            drawn = self._random.random() * steps[-1]
            token = int(ids[np.searchsorted(steps, drawn, side="right")])
        if self._seen is not None and token not in self._seen:
            self._seen = np.append(self._seen, token)
        return token


def penalize(logits: Array, seen: Ids, penalty: float) -> Array:
    """Tokens seen before are made less likely (Keskar et al. 2019, CTRL), once each; in place."""
    scores = logits[seen]
    logits[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
    return logits


def distribution(logits: Array, sampling: Sampling) -> tuple[Ids, Array]:
    """The tokens left by temperature, top-k and top-p, in this order, and their probabilities.

    `logits`: [vocabulary] float32. Raises RunError: they are no numbers.
    """
    scores: Array = np.divide(logits, np.float32(sampling.temperature))
    highest = scores.max()
    if not np.isfinite(highest):
        raise _make_no_numbers_error()
    ids = None
    if 0 < sampling.top_k < len(scores):
        ids = _find_highest(scores, sampling.top_k)
        scores = scores[ids]
    # In float32, as transformers computes them; sums of a whole vocabulary need more.
    chances = np.exp(np.subtract(scores, highest))
    chances /= np.float32(chances.sum(dtype=np.float64))
    if sampling.top_p < 1.0:
        kept = _find_nucleus(chances, sampling.top_p)
        chances = chances[kept] / np.float32(chances[kept].sum(dtype=np.float64))
        ids = kept if ids is None else ids[kept]
    return np.arange(len(scores)) if ids is None else ids, chances


def _find_highest(scores: Array, top_k: int) -> Ids:
    """The highest `top_k`; equals of the last one stay, as in transformers."""
    # The bound is reached by the peaks of `top_k` groups, so by `top_k` scores at least: no score below it is wanted.
    # That takes a tenth of the time of partitioning all scores.
    grouped = scores[: len(scores) - len(scores) % _GROUPED].reshape(_GROUPED, -1)
    peaks = grouped.max(axis=0, initial=-np.inf)
    near = np.arange(len(scores))
    if top_k < len(peaks):
        bound = np.partition(peaks, -top_k)[-top_k]
        near = np.flatnonzero(np.greater_equal(scores, bound))
    last = np.partition(scores[near], -top_k)[-top_k]
    highest: Ids = near[np.greater_equal(scores[near], last)]
    return highest


def _find_nucleus(chances: Array, top_p: float) -> Ids:
    """The fewest of the likeliest tokens that reach `top_p` together (Holtzman et al. 2019); one at least."""
    # All tokens below the floor together stay below 1 - top_p: they need no sorting.
    kept = np.flatnonzero(np.greater_equal(chances, (1 - top_p) / len(chances)))
    order = kept[np.argsort(chances[kept], kind="stable")]
    dropped = max(0.0, 1.0 - float(chances[kept].sum(dtype=np.float64)))
    below = dropped + chances[order].cumsum(dtype=np.float64)
    within = order[below > 1 - top_p]
    return np.sort(within if len(within) else order[-1:])


def _make_no_numbers_error() -> RunError:
    return RunError(
        "the model's logits must be numbers, and hold NaN or nothing finite; "
        "if it runs in float16, try float32; else look at the adapter's scale"
    )
