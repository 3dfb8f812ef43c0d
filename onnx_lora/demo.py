"""The demo: one embedded text model, four adapters with heads of different sizes, three ways to run them.

It uses the package as any user would, and measures what it claims."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lora.errors import InputError, MissingDependencyError, PromptError
from onnx_lora.exporter import attach
from onnx_lora.points import Array
from onnx_lora.runtime import AdapterSession, fold
from onnx_lora.runtime.generation.text import translate_failures
from onnx_lora.staging import scratch

__all__ = ["MODEL", "Answer", "DemoResult", "DemoTask", "run_demo", "tokenize"]

# The model and its adapters, as examples/train_demo.py made them.
MODEL = Path(__file__).parent / "demo_model"

# Timed calls of each kind; the median of so many is steady to a few per cent.
_CALLS = 60

# Calls of each kind before the first that is timed.
_WARM_UP = 5


@dataclass(frozen=True, slots=True)
class DemoTask:
    """One adapter of the demo."""

    name: str
    """The task."""

    labels: tuple[str, ...]
    """What it tells apart."""

    accuracy: float
    """The share of right answers, measured in PyTorch when it was trained."""

    rank: int
    """The adapter's rank."""

    size_bytes: int
    """The size of the adapter's tensors."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a task says of a sentence."""

    label: str
    """The likeliest label."""

    probability: float
    """How likely it is."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Four tasks on one small model."""

    sentences: tuple[str, ...]
    """What was asked."""

    tasks: tuple[DemoTask, ...]
    """The adapters."""

    answers: tuple[tuple[Answer, ...], ...]
    """`answers[i][j]`: sentence i under task j."""

    mixed_difference: float
    """The largest difference, over all logits, of a mixed batch from single calls."""

    fold_difference: float
    """The largest difference, over all logits, of folded adapters from adapters kept apart."""

    seconds: dict[str, float]
    """Median times, by what was timed."""

    base_bytes: int
    """The size of the base model."""

    adapter_bytes: int
    """The size of all adapters together."""

    package: str | None
    """The package's folder; None where it was not kept."""


def run_demo(
    texts: Sequence[str] = (), *, keep: Path | None = None, progress: Callable[[str, int, int], None] = lambda *_: None
) -> DemoResult:
    """Attach points to the embedded model, load its adapters, and answer `texts` (default: its own) under each.

    Raises MissingDependencyError: `tokenizers` is not installed. OutputExistsError: `keep` exists.
    """
    sentences = _choose_sentences(texts)
    feeds = tokenize(sentences)
    with scratch() as place:
        progress("attach", 0, 4)
        start = time.perf_counter()
        package = attach(MODEL / "model.onnx", keep or place / "package")
        attached = time.perf_counter() - start
        session = AdapterSession(package)
        descriptions = _read_tasks()
        start = time.perf_counter()
        for name in descriptions:
            session.load_adapter(name, MODEL / "adapters" / name)
        loaded = time.perf_counter() - start
        tasks = tuple(_describe_task(session, name, facts) for name, facts in descriptions.items())

        progress("switch", 1, 4)
        single = {task.name: _take_logits(session.run(None, feeds, adapter=task.name)) for task in tasks}
        progress("mix", 2, 4)
        mixed = _run_mixed(session, feeds, tasks)
        progress("fold", 3, 4)
        sessions = {task.name: fold(package, MODEL / "adapters" / task.name) for task in tasks}
        folded = {name: _take_logits(own.run(None, feeds)) for name, own in sessions.items()}
        seconds = {"attach the points, once": attached, "load four adapters": loaded}
        seconds |= _time_calls(session, sessions[tasks[0].name], feeds, tasks)
    answers: list[tuple[Answer, ...]] = []
    for row in range(len(sentences)):
        answers.append(tuple(_choose_answer(single[task.name][row], task) for task in tasks))
    return DemoResult(
        sentences=tuple(sentences),
        tasks=tasks,
        answers=tuple(answers),
        mixed_difference=max(_measure_difference(mixed[name], single[name]) for name in single),
        fold_difference=max(_measure_difference(folded[name], single[name]) for name in single),
        seconds=seconds,
        base_bytes=(MODEL / "model.onnx").stat().st_size,
        adapter_bytes=sum(task.size_bytes for task in tasks),
        package=None if keep is None else str(keep),
    )


def _read_tasks() -> dict[str, dict[str, Any]]:
    tasks: dict[str, dict[str, Any]] = json.loads((MODEL / "tasks.json").read_text("utf-8"))
    return tasks


def _choose_sentences(texts: Sequence[str]) -> list[str]:
    if texts and not all(text.strip() for text in texts):
        raise InputError("a text must hold a sentence, and is empty")
    if texts:
        return list(texts)
    # The first two examples of each task: every task has something to say, and the table fits a screen.
    examples: list[str] = []
    for facts in _read_tasks().values():
        examples += facts["examples"][:2]
    return examples


def tokenize(sentences: Sequence[str]) -> dict[str, Array]:
    """Sentences as the model's inputs, padded to the longest: each `[sentences, tokens]`, int64.

    Raises MissingDependencyError: `tokenizers` is not installed. PromptError: a sentence is no text.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError("the demo needs tokenizers: pip install 'onnx-lora[cpu,demo]'") from error
    length = int(json.loads((MODEL / "config.json").read_text("utf-8"))["max_position_embeddings"])
    with translate_failures(PromptError, "the sentences must be valid Unicode, and the tokenizer refuses them"):
        tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        tokenizer.enable_truncation(max_length=length)
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"))
        encoded = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([entry.ids for entry in encoded], np.int64),
        "attention_mask": np.array([entry.attention_mask for entry in encoded], np.int64),
        "token_type_ids": np.array([entry.type_ids for entry in encoded], np.int64),
    }


def _describe_task(session: AdapterSession, name: str, facts: Mapping[str, Any]) -> DemoTask:
    bound = session.adapters[name]
    size = sum(value.nbytes for value in bound.tensors.values())
    return DemoTask(name, tuple(facts["labels"]), facts["accuracy"], max(bound.coverage.ranks.values()), size)


def _take_logits(outputs: Sequence[Any]) -> Array:
    logits: Array = outputs[0]
    return logits


def _run_mixed(session: AdapterSession, feeds: Mapping[str, Array], tasks: Sequence[DemoTask]) -> dict[str, Array]:
    """Every sentence under every task, in one call: rows `[task 0, task 0, ..., task 1, ...]`."""
    count = len(feeds["input_ids"])
    rows: list[str] = []
    for task in tasks:
        rows += [task.name] * count
    repeated = {name: np.concatenate([value] * len(tasks)) for name, value in feeds.items()}
    logits = _take_logits(session.run(None, repeated, adapter=tuple(rows)))
    mixed: dict[str, Array] = {}
    for index, task in enumerate(tasks):
        # Heads differ in width; behind a narrower one's own labels stand probabilities of zero.
        mixed[task.name] = logits[index * count : (index + 1) * count, : len(task.labels)]
    return mixed


def _choose_answer(logits: Array, task: DemoTask) -> Answer:
    exponents = np.exp(logits - logits.max())
    best = int(exponents.argmax())
    return Answer(task.labels[best], float(exponents[best] / exponents.sum()))


def _measure_difference(actual: Array, expected: Array) -> float:
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())


def _time_calls(
    session: AdapterSession, folded: Any, feeds: Mapping[str, Array], tasks: Sequence[DemoTask]
) -> dict[str, float]:
    """Medians, the kinds of calls taking turns so that a slow moment of the machine hits all of them."""
    one = {name: value[:1] for name, value in feeds.items()}
    names = [task.name for task in tasks]

    def switch(turn: int) -> object:
        return session.run(None, one, adapter=names[turn % len(names)])

    calls: dict[str, Callable[[int], object]] = {
        "one sentence, base": lambda _: session.run(None, one),
        "one sentence, the same adapter again": lambda _: session.run(None, one, adapter=names[0]),
        "one sentence, another adapter every call": switch,
        "one sentence, folded": lambda _: folded.run(None, one),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_WARM_UP + _CALLS):
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn)
            taken = time.perf_counter() - start
            if turn >= _WARM_UP:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}
