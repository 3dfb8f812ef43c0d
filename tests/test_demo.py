"""The embedded model and its four trained adapters: PEFT's labels by every way of running them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from peft import PeftModel

from onnx_lora import AdapterSession, Package, fold
from onnx_lora.demo import MODEL, run_demo, tokenize
from onnx_lora.demo_text import BASE, WriterResult, run_writer
from onnx_lora.errors import InputError, PromptError
from onnx_lora.exporter import attach
from onnx_lora.report import show_json
from onnx_lora.results import DemoRun
from tests.support.json_schema import check_result
from tests.support.numbers import assert_close

LIMIT = 8_000_000  # bytes: what the wheel may carry
TASKS: dict[str, dict[str, Any]] = json.loads((MODEL / "tasks.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return attach(MODEL / "model.onnx", tmp_path_factory.mktemp("demo") / "package")


@pytest.fixture(scope="module")
def checkpoint(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in PyTorch, put together again from the ONNX file: what kept its name, and W0 by module."""
    config = transformers.BertConfig.from_pretrained(MODEL)
    model = transformers.BertForSequenceClassification(config)
    graph = onnx.load(MODEL / "model.onnx").graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # values that the exporter found equal
        if node.op_type == "Identity" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
    for point in package.points.values():
        weights[f"{point.module}.weight"] = package.module_weight(point).T.copy()
    state = {name: torch.from_numpy(np.array(weights[name])) for name in model.state_dict() if name in weights}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == []
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def _sentences(data: Path) -> dict[str, list[str]]:
    """Some real sentences for each task, most of which no adapter was trained on."""
    text = data / "text"
    intents = json.loads((text / "snips" / "validate_GetWeather.json").read_text("latin-1"))["GetWeather"]
    return {
        "spam": [line.partition("\t")[2] for line in (text / "sms_spam" / "sms.tsv").read_text("utf-8").splitlines()],
        "sentiment": [
            line.rpartition("\t")[0] for line in (text / "sst2_clairett" / "test.tsv").read_text("utf-8").splitlines()
        ],
        "question": [
            line.partition(" ")[2] for line in (text / "trec_subj" / "TREC.test.all").read_text("latin-1").splitlines()
        ],
        "intent": ["".join(piece["text"] for piece in entry["data"]) for entry in intents],
    }


def _batches(sentences: list[str]) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    for start in range(0, len(sentences), 50):
        yield tokenize(sentences[start : start + 50])


@pytest.mark.parametrize("task", TASKS)
def test_every_sentence_gets_pefts_label(task: str, package: Package, checkpoint: Path, data: Path) -> None:
    labels = TASKS[task]["labels"]
    base = transformers.BertForSequenceClassification.from_pretrained(
        checkpoint, num_labels=len(labels), ignore_mismatched_sizes=True
    )
    reference = PeftModel.from_pretrained(base, str(MODEL / "adapters" / task)).eval()
    session, folded = AdapterSession(package), fold(package, MODEL / "adapters" / task)
    others = [name for name in TASKS if name != task]
    for name in TASKS:
        session.load_adapter(name, MODEL / "adapters" / name)
    for feeds in _batches(_sentences(data)[task][:200]):
        with torch.inference_mode():
            expected = reference(**{key: torch.from_numpy(value) for key, value in feeds.items()}).logits.numpy()
        rows: list[Any] = [task if row % 2 == 0 else others[row % 3] for row in range(len(expected))]
        mixed = session.run(None, feeds, adapter=rows)[0][::2]
        answers = {
            "switched": session.run(None, feeds, adapter=task)[0],
            "folded": folded.run(None, feeds)[0],
        }
        for answer in answers.values():
            assert_close(answer, expected)
            assert (answer.argmax(-1) == expected.argmax(-1)).all()
        assert_close(mixed[:, : len(labels)], expected[::2])
        assert (mixed.argmax(-1) == expected[::2].argmax(-1)).all()
        assert np.isneginf(mixed[:, len(labels) :]).all()


def test_the_demo_answers_and_measures() -> None:
    result = run_demo()
    assert [task.name for task in result.tasks] == list(TASKS)
    assert [len(task.labels) for task in result.tasks] == [len(TASKS[name]["labels"]) for name in TASKS]
    # The examples are two of each task, in its order: ham and spam, positive and negative.
    assert [answers[0].label for answers in result.answers[:2]] == ["ham", "spam"]
    assert [answers[1].label for answers in result.answers[2:4]] == ["positive", "negative"]
    assert result.mixed_difference < 1e-4
    assert result.fold_difference < 1e-4
    assert all(value > 0 for value in result.seconds.values())


def test_what_the_demo_prints_for_machines_is_what_the_schema_says(capsys: pytest.CaptureFixture[str]) -> None:
    show_json(DemoRun(run_demo(), run_writer()))
    body = json.loads(capsys.readouterr().out)
    check_result("demo", body)
    assert body["tasks"]["adapter_bytes"] == sum(task["size_bytes"] for task in body["tasks"]["tasks"])


def test_the_demo_answers_about_your_own_sentence() -> None:
    result = run_demo(["Is it warm in Lisbon?"])
    assert result.sentences == ("Is it warm in Lisbon?",)
    assert result.answers[0][3].label == "get weather"


def test_the_demo_refuses_an_empty_sentence() -> None:
    with pytest.raises(InputError, match="must hold a sentence"):
        run_demo([" "])


def test_the_demo_refuses_what_is_no_text() -> None:
    with pytest.raises(PromptError, match="must be valid Unicode"):
        run_demo(["\ud800"])


def test_the_embedded_model_is_small_and_whole() -> None:
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < LIMIT
    assert {file.suffix for file in files} == {".onnx", ".json", ".safetensors"}
    assert len({len(facts["labels"]) for facts in TASKS.values()}) > 2


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_accuracy_is_worth_showing(task: str) -> None:
    assert TASKS[task]["accuracy"] > TASKS[task]["majority"] + 0.05
    assert len(TASKS[task]["examples"]) == 3


@pytest.fixture(scope="module")
def written() -> WriterResult:
    rounds: list[dict[str, str]] = []
    result = run_writer(show=lambda texts: rounds.append(dict(texts)))
    assert rounds[-1] == {row.name: row.text for row in result.rows}
    return result


def test_every_adapter_writes_in_its_own_manner(written: WriterResult) -> None:
    texts = {row.name: row.text for row in written.rows}
    assert list(texts) == [BASE, "shakespeare", "names", "molecules", "requests"]
    assert all(text.startswith(written.prompt) for text in texts.values())
    assert len(set(texts.values())) == len(texts)
    own = {name: text.removeprefix(written.prompt).split() for name, text in texts.items()}
    assert set("".join(own["molecules"])) <= set("BCFHINOPSclnos0123456789()[]=#+-@/\\%.r")
    assert all(word.isalpha() for word in own["names"])
    assert len(own[BASE]) > 2 * len(own["names"]) / 3


def test_rows_write_alone_what_they_write_together(written: WriterResult) -> None:
    assert all(row.alone for row in written.rows)


def test_the_writer_is_small(written: WriterResult) -> None:
    assert written.base_bytes + written.adapter_bytes < LIMIT


def test_a_prompt_of_ones_own(written: WriterResult) -> None:
    assert all(row.text.startswith("I want") for row in run_writer("I want").rows)
    with pytest.raises(InputError, match="the prompt must hold a text"):
        run_writer(" ")
