"""Small models with random weights, one for each architecture we promise, and random PEFT adapters for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from tests.support.exporters import HAS_OPTIMUM
from tests.support.newer_models import NEWER

__all__ = ["ARCHITECTURES", "make_adapter", "make_model"]

_CORE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_GQA = _CORE | {"num_key_value_heads": 2}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION: dict[str, Any] = {key: value for key, value in _CORE.items() if key != "vocab_size"} | {
    "image_size": 32,
    "patch_size": 8,
}

# What vision transformers call them, before transformers 5 and since.
_QUERY_VALUE = ["query", "q_proj", "value", "v_proj"]

# Architecture -> (a model with random weights, the q/v projections by PEFT's suffixes).
ARCHITECTURES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA)), ["q_proj", "v_proj"]),
    "llama_tied": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, tie_word_embeddings=True)),
        ["q_proj", "v_proj"],
    ),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GQA)), ["q_proj", "v_proj"]),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GQA)), ["q_proj", "v_proj"]),
    "gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GQA, head_dim=8)), ["q_proj", "v_proj"]),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_CORE, **_SPECIAL)), ["qkv_proj"]),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)),
        ["c_attn"],
    ),
    "gpt_neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_CORE)), ["query_key_value"]),
    "opt": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=100,
                hidden_size=32,
                word_embed_proj_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
            )
        ),
        ["q_proj", "v_proj"],
    ),
    "falcon": (
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        ),
        ["query_key_value"],
    ),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**_CORE)), ["query", "value"]),
    "roberta": (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_CORE)), ["query", "value"]),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
        ),
        ["q_lin", "v_lin"],
    ),
    "modernbert": (
        lambda: hf.ModernBertForSequenceClassification(
            hf.ModernBertConfig(**_CORE, **_SPECIAL, cls_token_id=1, sep_token_id=2, reference_compile=False)
        ),
        ["Wqkv"],
    ),
    "deberta_v2": (
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                **_CORE,
                relative_attention=True,
                position_buckets=8,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
                pos_att_type="p2c|c2p",
                position_biased_input=False,
                max_position_embeddings=64,
            )
        ),
        ["query_proj", "value_proj"],
    ),
    "albert": (
        lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**_CORE, embedding_size=16)),
        ["query", "value"],
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=100,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        ["q", "v"],
    ),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=100,
                num_mel_bins=8,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_target_positions=40,
                decoder_start_token_id=1,
                **_SPECIAL,
            )
        ),
        ["q_proj", "v_proj"],
    ),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VISION)), _QUERY_VALUE),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
        ),
        _QUERY_VALUE,
    ),
    "clip": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config=_CORE | {"eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 0},
                vision_config=_VISION,
                projection_dim=16,
            )
        ),
        ["q_proj", "v_proj"],
    ),
    "gpt2_classifier": (
        lambda: hf.GPT2ForSequenceClassification(
            hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, num_labels=5, pad_token_id=0)
        ),
        ["c_attn"],
    ),
}
if not HAS_OPTIMUM:
    ARCHITECTURES |= NEWER


def make_model(name: str, *, seed: int = 0) -> Any:
    """The architecture's model in evaluation mode, always with the same weights.

    Larger than transformers initialises them: an adapter's effect must not drown in a nearly linear model.
    """
    torch.manual_seed(seed)
    model = ARCHITECTURES[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return model


def make_adapter(model: Any, folder: Path, *, seed: int = 1, **config: Any) -> Path:
    """Wrap `model` in PEFT with random A and B (in place), save the adapter, and give its folder.

    Classifiers get a head of their own, as PEFT's users train them.
    """
    torch.manual_seed(seed)
    heads = [head for head in ("classifier", "score") if hasattr(model, head)]
    defaults = {"init_lora_weights": False, "modules_to_save": heads or None}
    wrapped = get_peft_model(model, LoraConfig(**(defaults | config)))
    with torch.no_grad():
        # A trained head differs from the base's; PEFT starts it as a copy.
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.eval().save_pretrained(folder)
    return folder
