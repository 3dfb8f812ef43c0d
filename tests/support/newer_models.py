"""Small models of architectures that transformers has, or exports, from version 5 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

__all__ = ["MATRIX_ONLY", "NEWER"]

_CORE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_GQA = _CORE | {"num_key_value_heads": 2}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = _GQA | _SPECIAL
_HEADS = _DECODER | {"head_dim": 8}
_SLIDING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_BY_ITEMS: dict[str, Any] = {"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8}


def _gemma3n() -> Any:
    layers = ["sliding_attention", "full_attention"] * 2
    config = hf.Gemma3nTextConfig(
        **(_HEADS | {"num_hidden_layers": 4, "intermediate_size": [64] * 4}),
        **_BY_ITEMS,
        num_kv_shared_layers=2,
        laurel_rank=4,
        sliding_window=4,
        layer_types=layers,
        activation_sparsity_pattern=[0.0] * 4,
    )
    return hf.Gemma3nForCausalLM(config)


def _qwen3_5() -> Any:
    config = hf.Qwen3_5TextConfig(
        **_HEADS,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    return hf.Qwen3_5ForCausalLM(config)


def _granite_hybrid() -> Any:
    config = hf.GraniteMoeHybridConfig(
        **_DECODER,
        **_EXPERTS,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        shared_intermediate_size=32,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_expand=2,
    )
    return hf.GraniteMoeHybridForCausalLM(config)


def _bart() -> Any:
    config = hf.BartConfig(
        **_SPECIAL,
        vocab_size=100,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )
    return hf.BartForConditionalGeneration(config)


def _segformer() -> Any:
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        initializer_range=0.3,
    )
    return hf.SegformerForSemanticSegmentation(config)


def _mamba2() -> Any:
    config = hf.Mamba2Config(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    )
    return hf.Mamba2ForCausalLM(config)


def _siglip() -> Any:
    text = _CORE | {"max_position_embeddings": 16, "projection_size": 32}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=_VISION | {"intermediate_size": 64}))


def _wav2vec2() -> Any:
    config = hf.Wav2Vec2Config(
        **(_CORE | {"vocab_size": 32}),
        conv_dim=[16, 16],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
    )
    return hf.Wav2Vec2ForCTC(config)


# Architecture -> (a model with random weights, the q/v projections by PEFT's suffixes), as in `models`.
NEWER: dict[str, tuple[Callable[[], Any], list[str]]] = {
    name: (make, ["q_proj", "v_proj"])
    for name, make in {
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_HEADS)),
        "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**_HEADS, **_EXPERTS, moe_intermediate_size=16, num_experts=4)
        ),
        "qwen3_5": _qwen3_5,
        "ministral3": lambda: hf.Ministral3ForCausalLM(hf.Ministral3Config(**_HEADS)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_HEADS, query_pre_attn_scalar=8, sliding_window=4)),
        "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_HEADS, **_SLIDING, query_pre_attn_scalar=8)),
        "gemma3n": _gemma3n,
        "gemma4": lambda: hf.Gemma4ForCausalLM(
            hf.Gemma4TextConfig(**_HEADS, **_SLIDING, **_BY_ITEMS, global_head_dim=8, num_kv_shared_layers=0)
        ),
        "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**_DECODER)),
        "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_DECODER)),
        "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_DECODER, **_EXPERTS, num_experts=4)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GQA, **_EXPERTS, num_local_experts=4)),
        "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_DECODER)),
        "granitemoehybrid": _granite_hybrid,
        "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**_HEADS)),
        "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**_DECODER, layer_types=["conv", "full_attention"])),
        "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_HEADS, **_SLIDING, **_EXPERTS, num_local_experts=4)),
        "bart": _bart,
        "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_VISION)),
        "segformer": _segformer,
        "siglip": _siglip,
        "wav2vec2": _wav2vec2,
    }.items()
}
# It has no q and v projections.
NEWER["mamba2"] = (_mamba2, ["in_proj"])

# Those that are like another one, or take minutes: `make matrix` tries them.
MATRIX_ONLY = frozenset(
    [
        *("qwen3_5", "ministral3", "gemma2", "gemma3n", "gemma4", "smollm3", "olmo2", "olmoe", "mixtral", "granite"),
        *("granitemoehybrid", "glm4", "dinov2"),
    ]
)
