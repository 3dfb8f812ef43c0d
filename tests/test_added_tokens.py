"""Tables that PEFT saves by itself, because tokens were added (`save_embedding_layers`), equal PEFT on tied models, on
untied ones and on encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from onnx_lora import AdapterSession, Package, bind, fold, read_adapter
from onnx_lora.errors import BindError
from onnx_lora.exporter import export
from tests.support.exporters import VIA
from tests.support.numbers import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = np.array([[3, 1, 4, 1], [5, 9, 2, 96]])


def _save_base(folder: Path, *, tied: bool) -> None:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=tied)).save_pretrained(folder)


@pytest.fixture(scope="module", params=["untied, optimum", "tied, optimum", "untied, genai"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package]:
    from benchmarks.subject import make_tokenizer

    ties, exporter = request.param.split(", ")
    if exporter == "genai":
        pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI: pip install onnx-lora[genai]")
    folder = tmp_path_factory.mktemp("tokens")
    _save_base(folder / "base", tied=ties == "tied")
    make_tokenizer(folder / "base")
    names = ["lm_head", "embed_tokens"]
    return folder / "base", export(folder / "base", folder / "package", via=exporter, replaceable=names)


def _train(base: Path, out: Path, *, rows: int) -> Any:
    """An adapter with both tables, as PEFT saves it; and the model with it."""
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table.add_(torch.randn_like(table) / 10)
    targets = ["q_proj", "v_proj"]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    tuned.save_pretrained(out, save_embedding_layers=True)
    again = hf.AutoModelForCausalLM.from_pretrained(base)
    again.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(again, out).eval()


def _feeds(session: AdapterSession, ids: Any) -> dict[str, Any]:
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if "past" in value.name:
            feeds[value.name] = np.zeros((2, 4, 0, 16), np.float32)
        elif value.name == "position_ids":
            feeds[value.name] = np.array([[0, 1, 2, 3]] * 2)
    return feeds


@pytest.mark.parametrize("rows", [97, 101])
def test_both_tables_equal_peft(base: tuple[Path, Package], tmp_path: Path, rows: int) -> None:
    checkpoint, package = base
    tuned = _train(checkpoint, tmp_path / "a", rows=rows)
    session = AdapterSession(package)
    session.load_adapter("a", tmp_path / "a")
    ids = IDS if rows == 97 else np.where(IDS == 96, 100, IDS)
    with torch.inference_mode():
        expected = tuned(input_ids=torch.tensor(ids)).logits.numpy()
    assert expected.shape[-1] == rows
    assert_close(session.run(["logits"], _feeds(session, ids), adapter="a")[0], expected)


def test_what_the_file_leaves_out_is_written_to_the_tied_head(base: tuple[Path, Package], tmp_path: Path) -> None:
    """As an older PEFT saved it, or a tool that drops one of two equal tensors."""
    from safetensors.numpy import load_file, save_file

    checkpoint, package = base
    is_tied = bool(hf.AutoConfig.from_pretrained(checkpoint).tie_word_embeddings)
    _train(checkpoint, tmp_path / "a", rows=97)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: values for name, values in load_file(file).items() if "lm_head" not in name}, file)
    tuned = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "a").eval()
    bound = bind(read_adapter(tmp_path / "a"), package)
    assert ("lm_head.weight" in bound.coverage.replaced) == is_tied
    assert any("the two are tied" in note for note in bound.coverage.notes) == is_tied
    folded = fold(package, bound)
    session = AdapterSession(package)
    feeds = _feeds(session, IDS)
    with torch.inference_mode():
        expected = tuned(input_ids=torch.tensor(IDS)).logits.numpy()
    assert_close(folded.run(["logits"], feeds)[0], expected)


def test_a_package_that_cannot_replace_the_head_says_so(tmp_path: Path) -> None:
    _save_base(tmp_path / "base", tied=True)
    package = export(tmp_path / "base", tmp_path / "package", via=VIA, replaceable="embed_tokens", verify=False)
    _train(tmp_path / "base", tmp_path / "a", rows=97)
    with pytest.raises(
        BindError, match=r"lm_head\.weight: the package cannot replace it; export again with `replaceable="
    ):
        bind(read_adapter(tmp_path / "a"), package)


def test_a_package_with_nothing_replaceable_takes_tables_that_are_the_bases_own(tmp_path: Path) -> None:
    _save_base(tmp_path / "base", tied=True)
    package = export(tmp_path / "base", tmp_path / "package", via=VIA, verify=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    tuned.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    session = AdapterSession(package)
    session.load_adapter("a", tmp_path / "a")
    with torch.inference_mode():
        expected = tuned(input_ids=torch.tensor(IDS)).logits.numpy()
    assert_close(session.run(["logits"], _feeds(session, IDS), adapter="a")[0], expected)


@pytest.mark.parametrize("rows", [97, 101])
def test_an_encoder_has_only_the_one_table(tmp_path: Path, rows: int) -> None:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if not name.endswith("token_id")}
    hf.BertModel(hf.BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    package = export(tmp_path / "base", tmp_path / "package", task="feature-extraction", replaceable="word_embeddings")
    model = hf.BertModel.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    tuned = get_peft_model(model, config).eval()
    tuned.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    session = AdapterSession(package)
    session.load_adapter("a", tmp_path / "a")
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}
    with torch.inference_mode():
        expected = tuned(input_ids=torch.tensor(IDS)).last_hidden_state.numpy()
    assert_close(session.run(["last_hidden_state"], feeds, adapter="a")[0], expected)
