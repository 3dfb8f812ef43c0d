"""Checkpoints that transformers 5 saved, read by transformers 4: the same numbers, or a refusal that names the field.

What version 5 computes is said here in version 4's own words, beside its words; that both agree was measured once with
both versions on 60 architectures, bit for bit or within rounding."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from onnx_lora import OnnxLoraError
from onnx_lora.errors import ModelError, VerificationError
from onnx_lora.exporter import export
from onnx_lora.exporter.frontends.configs.newer import open_readable, translate_config
from onnx_lora.exporter.frontends.exporters.genai import load_causal_model
from onnx_lora.exporter.frontends.exporters.optimum import load_model
from onnx_lora.exporter.verification.verify import verify
from tests.support.exporters import VIA

pytestmark = pytest.mark.skipif(not hf.__version__.startswith("4."), reason="the installed transformers is not 4")

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
V5 = {"transformers_version": "5.24.0"}
SHORT, LONG = [1.0 + i / 9 for i in range(8)], [2.0 + i for i in range(8)]


def config(model_type: str, parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "rope_parameters": parameters} | V5 | fields


def layers(full: Any, sliding: Any) -> dict[str, Any]:
    return {"full_attention": full, "sliding_attention": sliding}


BASE = {"rope_type": "default", "rope_theta": 777.0}
OTHER = {"rope_type": "default", "rope_theta": 99.0}


@pytest.mark.parametrize(
    "given, wanted",
    [
        (config("llama", BASE), {"rope_theta": 777.0, "rope_scaling": None}),
        (
            config("llama", BASE | {"rope_type": "linear", "factor": 3.0}),
            {"rope_theta": 777.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        ),
        (
            config(
                "llama",
                {"type": "yarn", "rope_theta": 777.0, "factor": 4.0, "original_max_position_embeddings": 16},
            ),
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        ),
        (config("stablelm", BASE | {"partial_rotary_factor": 0.5}), {"partial_rotary_factor": 0.5}),
        # Version 4's default is a quarter of the head, version 5's is all of it.
        (config("stablelm", BASE), {"partial_rotary_factor": 1.0}),
        (
            config("gpt_neox", BASE | {"partial_rotary_factor": 0.5}),
            {"rotary_emb_base": 777.0, "rotary_pct": 0.5},
        ),
        (
            config(
                "phi3",
                BASE
                | {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
                | {"original_max_position_embeddings": 8},
                max_position_embeddings=64,
            ),
            {
                "original_max_position_embeddings": 8,
                "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
            },
        ),
        (
            config("gemma3_text", layers(BASE | {"rope_type": "linear", "factor": 8.0}, OTHER)),
            {
                "rope_theta": 777.0,
                "rope_local_base_freq": 99.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (config("modernbert", layers(BASE, OTHER)), {"global_rope_theta": 777.0, "local_rope_theta": 99.0}),
        (config("olmo3", layers(BASE, BASE)), {"rope_theta": 777.0, "rope_scaling": None}),
        (
            {"model_type": "t5", "scale_decoder_outputs": False, "tie_word_embeddings": True} | V5,
            {"tie_word_embeddings": False},
        ),
        ({"model_type": "qwen3_moe", "num_local_experts": 4} | V5, {"num_experts": 4}),
        (
            {"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]} | V5,
            {"time_step_limit": [0.0, float("inf")]},
        ),
        # The rule for rotary embeddings holds for whoever writes them, of whatever version.
        ({"model_type": "llama", "rope_parameters": BASE}, {"rope_theta": 777.0}),
    ],
)
def test_what_version_5_says_is_said_in_the_words_of_version_4(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    translated = translate_config(given, "it")
    assert {name: translated[name] for name in wanted} == wanted


def test_a_config_within_a_config_is_translated_too() -> None:
    translated = translate_config({"model_type": "llava", "text_config": config("llama", BASE)} | V5, "it")
    assert translated["text_config"]["rope_theta"] == 777.0


@pytest.mark.parametrize(
    "given, words",
    [
        (config("llama", BASE | {"rope_type": "proportional"}), "rope_parameters: version 4 knows the kinds"),
        (config("llama", BASE | {"rope_type": "yarn"}), "yarn must say factor and original_max"),
        (config("llama", {"rope_type": "default"}), "must hold numbers above 0, and holds None"),
        (config("llama", BASE | {"rope_theta": "big"}), "holds 'big'"),
        (config("llama", layers(BASE, OTHER)), "layers with and without a window must be alike"),
        (config("olmo3", layers(BASE | {"rope_type": "linear", "factor": 2.0}, BASE)), "must be alike"),
        (config("gemma3_text", layers(BASE, OTHER | {"rope_type": "linear", "factor": 2.0})), "nothing but a base"),
        (config("gemma3_text", {"full_attention": BASE}), "there must be parameters for"),
        (config("qwen2", BASE | {"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (
            config(
                "llama",
                BASE
                | {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 3.0}
                | {"original_max_position_embeddings": 8},
                max_position_embeddings=64,
            ),
            "takes 8 for the factor of longrope",
        ),
        ({"model_type": "llama", "head_gate": "sigmoid"} | V5, "head_gate: has the value 'sigmoid'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True} | V5, "use_bidirectional_attention"),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "new": 1}} | V5, r"text_config\.new"),
    ],
)
def test_what_version_4_cannot_be_told_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        translate_config(given, "it")
    assert "save it again with transformers 4" in str(caught.value)


@pytest.mark.parametrize("version", ["4.57.6", "4.30.0", "", None, "nightly"])
def test_unknown_fields_of_no_newer_version_are_anybodys_notes(version: str | None) -> None:
    given = {"model_type": "llama", "my_tag": "v1", "transformers_version": version}
    assert translate_config(given, "it") == given


@pytest.mark.parametrize(
    "fields", [{"use_bidirectional_attention": False}, {"use_bidirectional_attention": None}, {"unsloth_version": "1"}]
)
def test_fields_that_say_what_version_4_does_anyway_are_no_reason_to_refuse(fields: dict[str, Any]) -> None:
    translate_config({"model_type": "gemma2"} | V5 | fields, "it")


# --- through the frontends ---------------------------------------------------------------------------


def as_version_5(folder: Path, parameters: dict[str, Any] = BASE, **fields: Any) -> Path:
    """A checkpoint's config in the words of version 5."""
    file = folder / "config.json"
    old = json.loads(file.read_text("utf-8"))
    new = {name: value for name, value in old.items() if not name.startswith("rope_")}
    file.write_text(json.dumps(new | V5 | {"rope_parameters": parameters} | fields), "utf-8")
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama of another base than the default."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_theta=777.0))
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim == 2 else 1.0)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def answer(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.arange(4, 16)[None]).logits.numpy()


@pytest.mark.parametrize(
    "load", [lambda path: load_model(path, task=None)[0], lambda path: load_causal_model(path, precision="fp32")]
)
def test_every_loader_computes_with_the_base_of_version_5(llama: Path, load: Any) -> None:
    wanted = answer(load(llama))
    found = answer(load(as_version_5(llama)))
    np.testing.assert_array_equal(found, wanted)
    ignored = answer(hf.LlamaForCausalLM.from_pretrained(llama, attn_implementation="eager"))
    assert np.abs(ignored - wanted).max() > 1e-3, "or nothing was compared"


@pytest.mark.parametrize("via", ["optimum", "genai"])
def test_a_package_of_a_version_5_checkpoint_has_its_numbers(llama: Path, tmp_path: Path, via: str) -> None:
    wanted = load_causal_model(llama, precision="fp32")
    package = export(as_version_5(llama), tmp_path / via, via=via)
    assert verify(package, llama)
    wrong = hf.LlamaConfig(**SIZES, rope_theta=10000.0)
    wanted.config = wrong
    json_file = llama / "config.json"
    json_file.write_text(json.dumps(wrong.to_dict() | {"architectures": ["LlamaForCausalLM"]}), "utf-8")
    with pytest.raises(VerificationError):
        verify(package, llama)


def test_the_package_keeps_the_config_as_it_came(llama: Path, tmp_path: Path) -> None:
    package = export(as_version_5(llama), tmp_path / "out", via=VIA, verify=False)
    assert package.manifest.source["from"] == "llama"
    assert "llama" in (package.path / "config.json").read_text("utf-8")


@pytest.mark.parametrize("via", ["optimum", "genai"])
def test_an_unknown_field_of_a_newer_version_stops_an_export_with_the_users_path(
    llama: Path, tmp_path: Path, via: str
) -> None:
    with pytest.raises(ModelError, match="head_gate") as caught:
        export(as_version_5(llama, head_gate="sigmoid"), tmp_path / "out", via=via)
    assert str(llama) in str(caught.value)


def test_what_is_read_in_place_of_a_checkpoint_is_gone_afterwards_and_the_checkpoint_untouched(llama: Path) -> None:
    before = {file.name: file.read_bytes() for file in as_version_5(llama).iterdir()}
    with open_readable(llama) as read:
        assert read != llama
        assert json.loads((Path(read) / "config.json").read_text("utf-8"))["rope_theta"] == 777.0
    assert not Path(read).exists()
    assert {file.name: file.read_bytes() for file in llama.iterdir()} == before


def test_the_networks_of_a_pipeline_are_read_each_with_its_config(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    llama.rename(tmp_path / "pipeline" / "text_encoder")
    as_version_5(tmp_path / "pipeline" / "text_encoder")
    with open_readable(tmp_path / "pipeline") as read:
        assert json.loads((Path(read) / "text_encoder" / "config.json").read_text("utf-8"))["rope_theta"] == 777.0


# --- whole, or refused ---------------------------------------------------------------------------------


def without(folder: Path, *names: str) -> Path:
    file = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if name not in names}
    save_file(kept, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "load", [lambda path: load_model(path, task=None), lambda path: load_causal_model(path, precision="fp32")]
)
def test_a_weight_that_is_missing_is_never_invented(llama: Path, load: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: is missing"):
        load(without(llama, "model.layers.1.mlp.up_proj.weight"))


def test_a_weight_of_another_shape_is_refused_with_the_right_one(llama: Path) -> None:
    file = llama / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(51, 64)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight: must have shape \[50, 64\], and has another"):
        load_model(llama, task=None)


def test_a_head_of_another_task_may_be_new_and_is_told(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"pad_token_id": 0}), "utf-8")
    with caplog.at_level(logging.WARNING, "onnx_lora"):
        load_model(llama, task="text-classification")
    assert "holds no score.weight, which are random numbers now" in caplog.text


def test_a_new_head_does_not_excuse_what_else_is_missing(llama: Path) -> None:
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"pad_token_id": 0}), "utf-8")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.weight: is missing") as caught:
        load_model(without(llama, "model.layers.0.self_attn.q_proj.weight"), task="text-classification")
    assert "score" not in str(caught.value)


def test_a_weight_that_the_older_class_has_no_place_for_is_refused(llama: Path) -> None:
    file = as_version_5(llama) / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.gate.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"mlp\.gate\.weight: the installed transformers does not use it"):
        load_model(llama, task=None)


def test_weights_that_version_5_keeps_apart_are_not_tied(llama: Path) -> None:
    with pytest.raises(OnnxLoraError, match="makes them one"):
        load_model(as_version_5(llama, tie_word_embeddings=True), task=None)


def test_statistics_of_a_batch_norm_that_are_missing_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    model.save_pretrained(tmp_path)
    name = "resnet.embedder.embedder.normalization.running_var"
    with pytest.raises(ModelError, match=rf"{name}: is missing"):
        load_model(without(tmp_path, name), task=None)
