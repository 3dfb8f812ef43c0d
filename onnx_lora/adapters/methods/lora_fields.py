"""Fields of LoRA's config, which AdaLoRA's config has too: those that are understood, and those that are refused.

The reference is PEFT 0.21: `LoraConfig`, and `LoraLayer.resolve_lora_variant`.
"""

from __future__ import annotations

from onnx_lora.adapters.methods.method import MERGE, RETRAIN, Refusal

__all__ = ["LORA_FIELDS", "LORA_REFUSED"]

LORA_FIELDS = frozenset(
    {
        "alpha_pattern",
        "corda_config",
        "enable_lora",
        "ensure_weight_tying",
        "eva_config",
        "init_lora_weights",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",  # until PEFT 0.3: whether eval() merges
        "qalora_group_size",
        "r",
        "rank_pattern",
        "runtime_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",  # another backward pass; forward is LoRA's
    }
)

LORA_REFUSED = {
    "alora_invocation_tokens": Refusal("aLoRA: acts only behind certain tokens", RETRAIN),
    "arrow_config": Refusal(
        "Arrow: routes every token among adapters", "convert the adapters it routes among, one by one"
    ),
    "kasa_config": Refusal("KaSA: changes the base's weights", MERGE),
    "layer_replication": Refusal("the base's layers are repeated", "export the enlarged model and give it the adapter"),
    "megatron_config": Refusal("Megatron's parallel layers", MERGE),
    "monteclora_config": Refusal("MonteCLoRA: samples its weights", RETRAIN),
}
