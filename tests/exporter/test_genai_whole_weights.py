"""Whole weights of graphs by the GenAI builder: norms, tables and heads have the checkpoint's names, tied ones too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from onnx_lora import AdapterSession, Package, attach, fold
from onnx_lora.errors import ModelError
from onnx_lora.exporter import export
from onnx_lora.exporter.frontends.exporters.genai import load_causal_model, references
from tests.support.numbers import assert_close

_CORE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}

MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_CORE)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_CORE, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_CORE)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_CORE)),
}

REFUSED = "its values are not the checkpoint's"


def _save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder)
    return folder


def _tune(checkpoint: Path, folder: Path, saved: list[str]) -> Path:
    torch.manual_seed(1)
    model = load_causal_model(checkpoint, precision="fp32")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved, init_lora_weights=False)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) / 10)
    tuned.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", ["all-linear", "all"])
@pytest.mark.parametrize("saved", [["norm"], ["embed_tokens"], ["lm_head"], ["norm", "embed_tokens", "lm_head"]])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3"])
def test_whole_weights_are_replaced_as_peft_does(name: str, saved: list[str], targets: str, tmp_path: Path) -> None:
    checkpoint = _save(name, tmp_path / "checkpoint")
    package = export(checkpoint, tmp_path / "package", via="genai", targets=targets, replaceable=saved)
    known = dict(hf.AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters(remove_duplicate=False))
    assert set(package.replaceable) <= set(known)

    adapter = _tune(checkpoint, tmp_path / "adapter", saved)
    model = load_causal_model(checkpoint, precision="fp32")
    (case,) = references(model)
    base = case.answer()["logits"]
    PeftModel.from_pretrained(model, adapter).eval()
    expected = case.answer()["logits"]
    session = AdapterSession(package)
    session.load_adapter("it", adapter)
    feeds = case.feeds([value.name for value in session.get_inputs()])
    assert_close(session.run(["logits"], feeds)[0], base)
    assert_close(session.run(["logits"], feeds, adapter="it")[0], expected)
    assert_close(fold(package, adapter).run(["logits"], feeds)[0], expected)
    assert abs(expected - base).max() > 0.01


@pytest.mark.parametrize("given", ["export", "checkpoint", "names"])
def test_norms_that_the_builder_changed_are_refused(given: str, tmp_path: Path) -> None:
    """Gemma multiplies with 1 + w, and the builder writes that down in the place of w: an adapter's w would lack 1."""
    checkpoint = _save("gemma2", tmp_path / "checkpoint")
    whole: dict[str, Any] = {"replaceable": ["input_layernorm"]}
    if given == "export":
        with pytest.raises(ModelError, match=REFUSED):
            export(checkpoint, tmp_path / "package", via="genai", verify=False, **whole)
        return
    package = export(checkpoint, tmp_path / "package", via="genai", verify=False)
    if given == "checkpoint":
        whole["checkpoint"] = checkpoint
    with pytest.raises(ModelError, match=REFUSED):
        attach(_base_of(package, tmp_path / "graph"), tmp_path / "attached", **whole)


def test_without_the_checkpoint_the_builders_names_are_translated(tmp_path: Path) -> None:
    package = export(_save("qwen3", tmp_path / "checkpoint"), tmp_path / "package", via="genai", verify=False)
    attached = attach(_base_of(package, tmp_path / "graph"), tmp_path / "attached", replaceable=["norm", "q_norm"])
    assert {"model.norm.weight", "model.layers.0.self_attn.q_norm.weight"} <= set(attached.replaceable)


def test_a_quantized_table_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = _save("llama_tied", tmp_path / "checkpoint")
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight: its weight is quantized"):
        export(checkpoint, tmp_path / "package", precision="int4", replaceable=["embed_tokens"])


def _base_of(package: Package, folder: Path) -> Path:
    """The package's plain graph, as the builder would have left it."""
    shutil.copytree(package.path, folder)
    shutil.copyfile(package.path / package.graph().base_file, folder / "model.onnx")
    (folder / "onnx_lora.json").unlink()
    return folder / "model.onnx"
