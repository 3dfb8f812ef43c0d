"""A verdict on every adapter of the test data: files that people published, some of them broken."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from onnx_lora import OnnxLoraError, read_adapter
from onnx_lora.adapters.formats.peft.config import read_config
from onnx_lora.adapters.methods.registry import METHODS

DATA = Path(os.environ.get("ONNX_LORA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

# Folder: number of deltas and of whole weights, or the error and words of its message.
VERDICTS: dict[str, tuple[int, int] | tuple[str, str]] = {
    "adapters/berttiny_vqa_rishabh": (4, 0),
    "adapters/bloom_bin_oldmerged_wujindou": (24, 0),
    "adapters/distilbert_bin_sidkris": (18, 4),
    "adapters/distilbert_classifieronly_kuntya": (1, 4),
    "adapters/distilbert_emotion6": (12, 4),
    "adapters/distilbert_hate_karan": (12, 4),
    "adapters/finegates_mrpc_peftPR": ("UnsupportedAdapterError", "FINEGATES"),
    "adapters/gemma3_270m_svg_0112LY": (36, 0),
    "adapters/gpt2_chess_a": (12, 0),
    "adapters/gpt2_chess_b": (12, 0),
    "adapters/gpt2_pseudocode": (36, 0),
    "adapters/gpt2_seqcls6_anirudh": (12, 1),
    "adapters/gpt2_untrained_sukhmandhawan": (12, 1),
    "adapters/gptneo_movies_sara": ("AdapterFileError", "'Copy of adapter_model.safetensors'"),
    "adapters/lerobot_odd_inishpy": ("AdapterFileError", "must hold peft_type"),
    "adapters/llama_desmason": (32, 0),
    "adapters/llama_truncated_sherry": ("AdapterFileError", "cut off"),
    "adapters/opt125m_bf16_guilherme": (24, 0),
    "adapters/peft_regression/adalora_mlp_0.6.1": (1, 0),
    "adapters/peft_regression/lora_conv2d_0.6.1": (1, 0),
    "adapters/peft_regression/lora_emb_conv1d_0.6.1": (2, 0),
    "adapters/peft_regression/lora_mlp_modules_to_save_0.6.1": (1, 2),
    "adapters/pythia_r1_f16_bk7195": (24, 0),
    "adapters/roberta_sidmahurkar": (24, 4),
    "adapters/segformer_polarbeargo": (16, 15),
    "adapters/t5small_bin_recommender": (36, 0),
    "adapters/t5small_noconfig_rajpreet": ("AdapterFileError", "must hold adapter_config.json"),
    "adapters/vit_food_lockheed": (24, 2),
    "adapters/whisper_small_erika": (72, 0),
    "other_formats/adapterhub_bert": ("AdapterFileError", "AdapterHub"),
    "other_formats/cloneofsimo": ("AdapterFileError", "must hold adapter_config.json"),
    "other_formats/cloneofsimo/lora_disney.safetensors": ("UnsupportedAdapterError", "the embedding of a token"),
    "other_formats/diffusers_timohavdk": ("AdapterFileError", "must hold adapter_config.json"),
    "other_formats/diffusers_timohavdk/new.safetensors": (128, 0),
    "other_formats/diffusers_vfph55_half": (128, 0),
    "other_formats/diffusers_wellCh4n_pokemon": (128, 0),
    "other_formats/mlx_arjun254_gemma2b": ("UnsupportedAdapterError", "set scale to 20"),
    "other_formats/mlx_npz_vtboyarc": ("UnsupportedAdapterError", "the scale is unknown"),
    "other_formats/ptuning_chatglm": ("UnsupportedAdapterError", "PREFIX_TUNING"),
}

pytestmark = pytest.mark.skipif(not (DATA / "adapters").is_dir(), reason=f"no test data in {DATA}")


@pytest.mark.parametrize("name", VERDICTS)
def test_every_published_adapter_is_read_whole_or_refused_by_name(name: str) -> None:
    expected = VERDICTS[name]
    if isinstance(expected[0], int):
        adapter = read_adapter(DATA / name)
        assert (len(adapter.deltas), len(adapter.replacements)) == expected
        return
    with pytest.raises(OnnxLoraError) as caught:
        read_adapter(DATA / name)
    assert (type(caught.value).__name__, expected[1] in str(caught.value)) == (expected[0], True), str(caught.value)


def test_no_adapter_is_without_a_verdict() -> None:
    folders = {f"adapters/{entry.name}" for entry in (DATA / "adapters").iterdir() if entry.is_dir()}
    assert folders - {"adapters/peft_regression"} <= set(VERDICTS)


def test_every_published_config_of_a_method_that_is_read_is_understood() -> None:
    for path in sorted((DATA / "adapter_configs").glob("*.json")):
        if json.loads(path.read_text("utf-8")).get("peft_type") in METHODS:
            read_config(path)
