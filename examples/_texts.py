"""The sentences of the examples' four tasks, read from the files their authors published.

It knows where the files lie and what they look like; it knows no model and no tokenizer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LABELS", "Sentence", "Split", "read_split"]

HELD_OUT_SPAM = 500  # sentences; the SMS collection has no split of its own

# By task, in the order of their numbers; spam and intents are named so in the files.
LABELS: dict[str, tuple[str, ...]] = {
    "spam": ("ham", "spam"),
    "sentiment": ("negative", "positive"),
    "question": ("description", "entity", "abbreviation", "human", "location", "number"),
    "intent": (
        "AddToPlaylist",
        "BookRestaurant",
        "GetWeather",
        "PlayMusic",
        "RateBook",
        "SearchCreativeWork",
        "SearchScreeningEvent",
    ),
}


@dataclass(frozen=True)
class Sentence:
    """`label` is the position of its name among the task's LABELS."""

    text: str
    label: int


@dataclass(frozen=True)
class Split:
    train: list[Sentence]
    test: list[Sentence]


def _read_spam(texts: Path) -> Split:
    rows = [line.split("\t", 1) for line in _lines(texts / "sms_spam" / "sms.tsv")]
    messages = [Sentence(text, LABELS["spam"].index(label)) for label, text in rows]
    random.Random(0).shuffle(messages)
    return Split(messages[HELD_OUT_SPAM:], messages[:HELD_OUT_SPAM])


def _read_sentiment(texts: Path) -> Split:
    def part(name: str) -> list[Sentence]:
        rows = [line.rsplit("\t", 1) for line in _lines(texts / "sst2_clairett" / f"{name}.tsv")]
        return [Sentence(text, int(label)) for text, label in rows]

    return Split(part("train"), part("test"))


def _read_questions(texts: Path) -> Split:
    def part(name: str) -> list[Sentence]:
        rows = [line.split(" ", 1) for line in _lines(texts / "trec_subj" / f"TREC.{name}.all", "latin-1")]
        return [Sentence(text, int(label)) for label, text in rows]

    return Split(part("train"), part("test"))


def _read_intents(texts: Path) -> Split:
    def part(name: str) -> Iterator[Sentence]:
        for index, label in enumerate(LABELS["intent"]):
            (utterances,) = json.loads((texts / "snips" / f"{name}_{label}.json").read_text("utf-8")).values()
            for utterance in utterances:
                yield Sentence("".join(piece["text"] for piece in utterance["data"]), index)

    return Split(list(part("train")), list(part("validate")))


def _lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """By line feeds alone: old files hold bytes that `splitlines` takes for a line's end."""
    return [line for line in path.read_text(encoding).split("\n") if line.strip()]


def _normalized(text: str) -> str:
    """What copies of a sentence share, whatever their punctuation."""
    return re.sub(r"\W+", " ", text.lower()).strip()


_READERS: dict[str, Callable[[Path], Split]] = {
    "spam": _read_spam,
    "sentiment": _read_sentiment,
    "question": _read_questions,
    "intent": _read_intents,
}


def read_split(task: str, texts: Path, *, train: int, test: int) -> Split:
    """At most so many sentences of each part, in random order, and no copy of a test sentence among the others.

    `texts`: the folder with a folder for each of the four collections.
    """
    split = _READERS[task](texts)
    held_out = {_normalized(sentence.text) for sentence in split.test}
    others = [sentence for sentence in split.train if _normalized(sentence.text) not in held_out]
    rng = random.Random(0)
    return Split(rng.sample(others, min(train, len(others))), rng.sample(split.test, min(test, len(split.test))))
