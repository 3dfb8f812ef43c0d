"""The sentences of the examples' four tasks, and what the demo's writer learns, from the files their authors published.

It knows where the files lie and what they look like; it knows no model and no tokenizer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LABELS", "Document", "Sentence", "Source", "Split", "read_english", "read_split", "read_styles"]

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

_LONGEST = 160  # characters of a plain sentence
_EVERY = 20  # of the lines to write like, one is held out
_QUESTION = re.compile(r"(who|whose|what|when|where|which|how|why|is|are|am|can|could|do|does|did|will|would|should)\b")
# Brackets that lost their marks, and words that a small model would repeat out of place.
_UNWANTED = re.compile(
    r"\b([lr]rb|sex\w*|porn\w*|rap(e|ed|ist)|fuck\w*|shit\w*|bitch\w*|clitoris|penis|goddamn)\b", re.I
)


@dataclass(frozen=True)
class Sentence:
    """`label` is the position of its name among the task's LABELS."""

    text: str
    label: int


@dataclass(frozen=True)
class Split:
    train: list[Sentence]
    test: list[Sentence]


@dataclass(frozen=True)
class Document:
    """A text to learn; `prompt` stands before it and is only read."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Source:
    """Lines that belong together. A document is a run of them, `fewest` to `most` lines long."""

    train: list[str]
    test: list[str]
    fewest: int = 1
    most: int = 4
    ordered: bool = False  # the lines are one long text
    prompts: tuple[str, ...] = ()  # plain English, the beginnings of which come first

    def documents(self, lines: list[str], rng: random.Random) -> Iterator[Document]:
        """One pass over the lines, cut anew: every pass has other neighbours, prompts and borders."""
        shift = rng.randrange(self.most) if self.ordered else 0
        left = lines[shift:] if self.ordered else rng.sample(lines, len(lines))
        while left:
            size = rng.randint(self.fewest, self.most)
            text, left = "\n".join(left[:size]), left[size:]
            words = rng.choice(self.prompts).split() if self.prompts and rng.random() < 0.75 else []
            prompt = " ".join(words[: rng.randint(1, 6)])
            yield Document("\n" + text if prompt else text, prompt)

    @classmethod
    def split(cls, lines: Iterable[str], **how: Any) -> Source:
        """Every line once, some held out."""
        kept = list(dict.fromkeys(lines))
        random.Random(0).shuffle(kept)
        return cls([line for i, line in enumerate(kept) if i % _EVERY], kept[::_EVERY], **how)


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


def read_english(texts: Path) -> dict[str, Source]:
    """Short sentences as people write them, by where they come from."""

    def everything(split: Split) -> list[str]:
        return [sentence.text for sentence in (*split.train, *split.test)]

    clinc = json.loads((texts / "clinc150" / "data_small.json").read_text("utf-8")).values()
    found = {
        "reviews": everything(_read_sentiment(texts)),
        "films": [line[2:] for line in _lines(texts / "trec_subj" / "subj.all", "latin-1")],
        "questions": everything(_read_questions(texts)),
        "errands": [text for part in clinc for text, _ in part],
        "requests": everything(_read_intents(texts)),
    }
    plain = {name: [_plain(text) for text in lines if not _UNWANTED.search(text)] for name, lines in found.items()}
    return {name: Source.split(line for line in lines if len(line) <= _LONGEST) for name, lines in plain.items()}


def read_styles(texts: Path, english: dict[str, Source]) -> dict[str, Source]:
    """Texts unlike plain English, and its requests. Before a list may stand a line that it has nothing to do with."""
    play = (texts / "tinyshakespeare" / "input.txt").read_text("utf-8").split("\n")
    border = len(play) - len(play) // _EVERY
    prompts = tuple(line for part in english.values() for line in part.train)
    names = (name.title() for name in _lines(texts / "names" / "names.txt"))
    molecules = _lines(texts / "smiles" / "2019PubChemQC_can_nocharge.smi")
    return {
        "shakespeare": Source(play[:border], play[border:], fewest=6, most=16, ordered=True),
        "names": Source.split(names, fewest=8, most=32, prompts=prompts),
        "molecules": Source.split(molecules, fewest=4, most=12, prompts=prompts),
        "requests": english["requests"],
    }


def _plain(text: str) -> str:
    """Undoes the treebank's spaces and small letters: "it is n't ." becomes "It isn't."."""
    text = re.sub(r"``|''|\"|`", "", text).replace("&#38;", "&").replace("( ", "(")
    text = re.sub(r" (?=n't\b|'(?:s|re|ve|ll|d|m)?(?: |$)|[.,!?;:)])", "", " ".join(text.split()))
    text = re.sub(r"\bi\b", "I", text)
    end = "" if text.endswith((".", "!", "?")) else "?" if _QUESTION.match(text.lower()) else "."
    return text[:1].upper() + text[1:] + end
