"""A package is made of standard parts: other people's loaders run it, with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers

from onnx_lora import AdapterSession, Package, bind, read_adapter, write_bound
from tests.support.models import make_adapter, make_model
from tests.support.numbers import assert_close

Make = Callable[[str], Path]

IDS = np.array([[5, 17, 42, 8], [3, 3, 60, 9]], np.int64)
FEEDS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}


def _plain(file: Path, options: ort.SessionOptions | None = None) -> ort.InferenceSession:
    options = options or ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(file), options)


@pytest.fixture(scope="module")
def bert(packages: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, Path]:
    folder = tmp_path_factory.mktemp("adapter")
    return Package.open(packages("bert")), make_adapter(
        make_model("bert"), folder / "it", r=4, lora_alpha=9, target_modules=["query", "dense"]
    )


@pytest.mark.parametrize(
    "name, loader",
    [
        ("bert", "ORTModelForSequenceClassification"),
        ("llama", "ORTModelForCausalLM"),
        ("t5", "ORTModelForSeq2SeqLM"),
        ("whisper", "ORTModelForSpeechSeq2Seq"),
    ],
)
def test_optimum_opens_the_folder_as_a_model(name: str, loader: str, packages: Make, checkpoints: Make) -> None:
    import optimum.onnxruntime

    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    model = getattr(optimum.onnxruntime, loader).from_pretrained(packages(name), session_options=session_options)
    reference = make_model(name)
    ids = torch.from_numpy(IDS)
    if name == "bert":
        inputs: dict[str, Any] = {key: torch.from_numpy(value) for key, value in FEEDS.items()}
        with torch.inference_mode():
            assert_close(model(**inputs).logits.numpy(), reference(**inputs).logits.numpy())
        return
    inputs = {"input_features": torch.randn(1, 8, 3000)} if name == "whisper" else {"input_ids": ids}
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    reference.generation_config = transformers.GenerationConfig.from_pretrained(checkpoints(name))
    assert torch.equal(model.generate(**inputs, **length), reference.generate(**inputs, **length))


def test_a_plain_session_runs_the_base_and_an_adapter_fed_as_inputs(bert: tuple[Package, Path]) -> None:
    package, adapter = bert
    ours = AdapterSession(package)
    ours.load_adapter("it", adapter)
    plain = _plain(package.path / "model.onnx")
    tensors = bind(read_adapter(adapter), package).tensors
    assert_close(plain.run(None, FEEDS)[0], ours.run(None, FEEDS)[0])
    fed = plain.run(None, FEEDS | dict(tensors))[0]
    assert_close(fed, ours.run(None, FEEDS, adapter="it")[0])
    assert np.abs(fed - plain.run(None, FEEDS)[0]).max() > 1e-2


def test_a_converted_safetensors_file_holds_the_graphs_inputs(bert: tuple[Package, Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    package, adapter = bert
    write_bound(bind(read_adapter(adapter), package), tmp_path / "it.safetensors")
    fed = _plain(package.path / "model.onnx").run(None, FEEDS | load_file(tmp_path / "it.safetensors"))[0]
    ours = AdapterSession(package)
    ours.load_adapter("it", adapter)
    assert_close(fed, ours.run(None, FEEDS, adapter="it")[0])


def test_onnx_runtimes_own_adapters_run_the_converted_file(bert: tuple[Package, Path], tmp_path: Path) -> None:
    package, adapter = bert
    file = tmp_path / "it.onnx_adapter"
    write_bound(bind(read_adapter(adapter), package), file, format="onnx_adapter")
    loaded = ort.LoraAdapter()  # must outlive the run: dropped, ONNX Runtime answers as the base
    loaded.Load(str(file))
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    active = _plain(package.path / "model.onnx").run(None, FEEDS, options)[0]
    ours = AdapterSession(package)
    ours.load_adapter("peft", adapter)
    ours.load_adapter("converted", file)
    expected = ours.run(None, FEEDS, adapter="peft")[0]
    assert_close(active, expected)
    assert_close(ours.run(None, FEEDS, adapter="converted")[0], expected)


def test_our_session_goes_where_an_inference_session_goes(bert: tuple[Package, Path]) -> None:
    ours, plain = AdapterSession(bert[0]), _plain(bert[0].path / "base.onnx")
    assert [arg.name for arg in ours.get_inputs()] == [arg.name for arg in plain.get_inputs()]
    assert [arg.name for arg in ours.get_outputs()] == [arg.name for arg in plain.get_outputs()]
    assert_close(ours.run(["logits"], FEEDS, ort.RunOptions())[0], plain.run(["logits"], FEEDS, ort.RunOptions())[0])
