"""Classes that read pictures or speech beside text: their language model is exported for text, under the names that
adapters of the whole class have, and gives the whole class's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from onnx_lora import AdapterSession, Package
from onnx_lora.errors import BindError, ModelError, VerificationError
from onnx_lora.exporter import export, verify
from onnx_lora.exporter.frontends.exporters import genai
from onnx_lora.exporter.frontends.source import Reference
from tests.support.exporters import HAS_OPTIMUM, VIA, load_model, references
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
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_PICTURES = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}


def _text(kind: str) -> dict[str, Any]:
    return {**_CORE, "model_type": kind}


def _gemma3() -> Any:
    tokens = {"image_token_index": 96, "boi_token_index": 94, "eoi_token_index": 95}
    text = {**_CORE, "sliding_window": 16}
    config = hf.Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=1, **tokens)
    return hf.Gemma3ForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    text = {**_CORE, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_PICTURES))


def _llava() -> Any:
    vision = {**_VISION, "model_type": "clip_vision_model"}
    config = hf.LlavaConfig(text_config=_text("llama"), vision_config=vision, image_token_index=96)
    return hf.LlavaForConditionalGeneration(config)


def _smolvlm() -> Any:
    config = hf.SmolVLMConfig(text_config=_text("llama"), vision_config=_VISION, image_token_id=96, pad_token_id=0)
    return hf.SmolVLMForConditionalGeneration(config)


def _qwen2_audio() -> Any:
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    audio |= {"num_mel_bins": 16, "max_source_positions": 20}
    config = hf.Qwen2AudioConfig(text_config=_text("qwen2"), audio_config=audio, audio_token_index=96)
    return hf.Qwen2AudioForConditionalGeneration(config)


def _paligemma() -> Any:
    vision = {**_VISION, "model_type": "siglip_vision_model"}
    config = hf.PaliGemmaConfig(
        text_config=_text("gemma"), vision_config=vision, image_token_index=96, projection_dim=64
    )
    return hf.PaliGemmaForConditionalGeneration(config)


# The models, the way to their layers, and what is left out.
MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "gemma3": (_gemma3, "model.language_model.layers", "model.vision_tower, model.multi_modal_projector"),
    "qwen2_vl": (_qwen2_vl, "model.language_model.layers", "model.visual"),
    "llava": (_llava, "model.language_model.layers", "model.vision_tower, model.multi_modal_projector"),
    "smolvlm": (_smolvlm, "model.text_model.layers", "model.vision_model, model.connector"),
    "qwen2_audio": (_qwen2_audio, "language_model.model.layers", "audio_tower, multi_modal_projector")
    if HAS_OPTIMUM
    else (_qwen2_audio, "model.language_model.layers", "model.audio_tower, model.multi_modal_projector"),
}

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _save(make: Callable[[], Any], folder: Path) -> Path:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)  # an adapter must not drown in a nearly linear model
    model.save_pretrained(folder)
    return folder


def _original(package: Package, checkpoint: Path) -> tuple[Any, Reference]:
    """The whole class in PyTorch, and the one graph's reference."""
    if package.manifest.source["made_by"] == "genai":
        model: Any = genai.load_causal_model(checkpoint, precision="fp32")
        return model, genai.references(model)[0]
    model, task = load_model(checkpoint, task=None)
    return model, references(model, task)[0]


def _run(session: AdapterSession, case: Reference, **choice: Any) -> Any:
    feeds = case.feeds([value.name for value in session.get_inputs()])
    return session.run(["logits"], feeds, **choice)[0]


@pytest.mark.parametrize("via", [VIA, "genai"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_the_whole_class_gives_the_whole_classs_numbers(name: str, via: str, tmp_path: Path) -> None:
    if via == "genai":
        pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI: pip install onnx-lora[genai]")
        if name == "gemma3":
            pytest.skip("the builder reads no Gemma 3 of transformers 5: see test_genai.py")
    make, layers, left_out = MODELS[name]
    checkpoint = _save(make, tmp_path / "checkpoint")
    package = export(checkpoint, tmp_path / "package", via=via)
    assert package.manifest.source["left_out"] == left_out
    assert package.manifest.source["task"] == "text-generation-with-past"
    assert all(module.startswith(layers) for module in package.points)

    model, case = _original(package, checkpoint)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=rf".*{layers}.*\.({'|'.join(TARGETS)})", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    model, case = _original(package, checkpoint)
    base = case.answer()["logits"]
    PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    expected = case.answer()["logits"]

    session = AdapterSession(package)
    session.load_adapter("it", tmp_path / "adapter")
    assert_close(_run(session, case), base)
    assert_close(_run(session, case, adapter="it"), expected)
    assert abs(expected - base).max() > 0.01


def test_no_option_is_needed_and_one_sentence_says_what_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = _save(_gemma3, tmp_path / "gemma")
    package = export(checkpoint, tmp_path / "package")
    if HAS_OPTIMUM:
        assert package.manifest.source["language_model"] == "Gemma3ForCausalLM"
    said = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    what = "its language model is exported, for text alone" if HAS_OPTIMUM else "exported for text alone"
    assert said == [f"gemma: {what}; the package leaves out model.vision_tower, model.multi_modal_projector"]
    assert all(entry.agrees for entry in verify(package, checkpoint))


def test_a_task_without_a_cache_is_exported_without_one(tmp_path: Path) -> None:
    package = export(_save(_gemma3, tmp_path / "gemma"), tmp_path / "package", task="text-generation")
    inputs = [value.name for value in AdapterSession(package).get_inputs()]
    assert not any("past" in name for name in inputs)


def test_an_adapter_of_a_part_that_is_left_out_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = _save(_llava, tmp_path / "llava")
    package = export(checkpoint, tmp_path / "package", via=VIA, verify=False)
    model, _ = _original(package, checkpoint)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BindError, match=r"leaves out model\.vision_tower"):
        AdapterSession(package).load_adapter("it", tmp_path / "adapter")


def test_a_class_that_reads_text_in_its_own_way_is_refused(tmp_path: Path) -> None:
    """PaliGemma lets every token of a prompt see all others, which no text-only class does."""
    error, message = (ModelError, "else of a text than") if HAS_OPTIMUM else (VerificationError, "must reproduce")
    with pytest.raises(error, match=message):
        export(_save(_paligemma, tmp_path / "checkpoint"), tmp_path / "package")


@pytest.mark.skipif(not HAS_OPTIMUM, reason="transformers 5 does not load such a config")
def test_rotary_positions_that_are_scaled_are_refused(tmp_path: Path) -> None:
    def make() -> Any:
        model = _qwen2_vl()
        model.config.text_config.rope_scaling = {"type": "mrope", "mrope_section": [2, 3, 3], "factor": 2.0}
        return model

    with pytest.raises(ModelError, match="must not be scaled"):
        export(_save(make, tmp_path / "checkpoint"), tmp_path / "package")
