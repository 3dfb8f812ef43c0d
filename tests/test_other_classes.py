"""An adapter of a vision-language class runs on the text-only package of the same language model, and equals PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.numpy import load_file, save_file

from onnx_lora import AdapterSession, Package, read_adapter
from onnx_lora.errors import AdapterFileError
from onnx_lora.exporter import export
from tests.support.exporters import VIA
from tests.support.models import make_adapter
from tests.support.numbers import assert_close

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = {"mm_tokens_per_image": 1, "image_token_index": 96, "boi_token_index": 94, "eoi_token_index": 95}

# As ms-swift writes it; unsloth's is like it.
OF_TODAY = r"^(model\.language_model(?=\.).*\.(q_proj|v_proj|down_proj))$"


def _whole() -> Any:
    torch.manual_seed(0)
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=TEXT, vision_config=VISION, **TOKENS)).eval()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The language model of the whole one, as the text-only class."""
    folder = tmp_path_factory.mktemp("text")
    text = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT))
    weights = {}
    for name, values in _whole().state_dict().items():
        if "language_model" in name or name.startswith("lm_head"):
            weights[name.replace("model.language_model.", "model.")] = values
    text.load_state_dict(weights)
    text.save_pretrained(folder / "base")
    return export(folder / "base", folder / "package", task="text-generation-with-past", via=VIA)


def _renamed(folder: Path, body: str) -> None:
    """Rename the tensors of an adapter in its file, as people do by hand, and leave its config as it is."""
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace("model.language_model.", body): values for name, values in load_file(file).items()}
    save_file(tensors, file)


@pytest.mark.slow
@pytest.mark.parametrize("body", ["model.language_model.", "language_model.model.", "model."])
def test_it_equals_peft_on_the_class_that_it_was_trained_on(package: Package, tmp_path: Path, body: str) -> None:
    tuned = _whole()
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 16}}
    folder = make_adapter(tuned, tmp_path / "a", r=3, target_modules=OF_TODAY, **patterns)
    _renamed(folder, body)
    session = AdapterSession(package)
    bound = session.load_adapter("a", folder)
    assert len(bound.coverage.applied) == 6
    notes = " ".join(bound.coverage.notes)
    assert ("trained on another class" in notes) == (body != "model.")
    assert ("the config is of another class" in notes) == (body != "model.language_model.")
    ids = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    names = [value.name for value in session.get_inputs()]
    feeds |= {name: np.zeros((2, 2, 0, 8), np.float32) for name in names if "past" in name}
    if "position_ids" in names:
        feeds["position_ids"] = np.tile(np.arange(4), (2, 1))
    with torch.inference_mode():
        expected = tuned(input_ids=torch.tensor(ids)).logits.numpy()
    assert_close(session.run(["logits"], feeds, adapter="a")[0], expected)
    assert np.abs(expected - session.run(["logits"], feeds)[0]).max() > 1e-3


@pytest.mark.parametrize("body", ["model.", "language_model.model."])
def test_a_configs_expression_of_another_class_is_read_with_its_names(tmp_path: Path, body: str) -> None:
    own = _adapter_folder(tmp_path, body, alpha_pattern={r"model\.language_model\..*q_proj": 32})
    adapter = read_adapter(own)
    scales = {module.rpartition(".")[2]: delta.scale for module, delta in adapter.deltas.items()}
    assert scales == {"q_proj": 8.0, "v_proj": 2.0}
    assert any("the config is of another class" in note for note in adapter.notes)


def test_an_expression_that_fits_two_classes_with_other_scales_is_refused(tmp_path: Path) -> None:
    patterns = {r"language_model\.model\..*q_proj": 32}
    own = _adapter_folder(tmp_path, "model.", target=r".*language_model.*\.(q|v)_proj", alpha_pattern=patterns)
    with pytest.raises(AdapterFileError, match="the config knows the modules by other names"):
        read_adapter(own)


def test_an_expression_that_takes_some_of_the_files_modules_counts_as_it_is(tmp_path: Path) -> None:
    own = _adapter_folder(tmp_path, "model.", target=r"model\.layers.*q_proj|model\.language_model.*v_proj")
    with pytest.raises(AdapterFileError, match="v_proj: has LoRA tensors that PEFT would ignore"):
        read_adapter(own)


def _adapter_folder(folder: Path, body: str, *, target: str = OF_TODAY, **config: Any) -> Path:
    tensors = {}
    for seed, module in enumerate(("q_proj", "v_proj")):
        numbers = np.random.default_rng(seed)
        name = f"base_model.model.{body}layers.0.self_attn.{module}"
        tensors[f"{name}.lora_A.weight"] = numbers.standard_normal((4, 8), np.float32)
        tensors[f"{name}.lora_B.weight"] = numbers.standard_normal((8, 4), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": target} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder
