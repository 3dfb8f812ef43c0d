"""The methods of PEFT that are read: one table by `peft_type`, with all names of fields and tensors that are known."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lora.adapters.formats.peft import factors, weights
from onnx_lora.adapters.formats.peft.keys import Names
from onnx_lora.adapters.formats.peft.lora import LORA_TENSORS, lora
from onnx_lora.adapters.formats.peft.method import Method
from onnx_lora.adapters.formats.peft.refused import LORA_REFUSED
from onnx_lora.adapters.formats.peft.tokens import TOKENS, TOKENS_BEFORE, trainable_tokens

__all__ = ["METHODS"]


def _bare(*tensors: str) -> dict[str, tuple[str, ...]]:
    """Parameters, which have nothing behind an adapter's name."""
    return dict.fromkeys(tensors, ("",))


_LORA_FIELDS = frozenset(
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

# AdaLoRA inherits LoRA's fields, and uses few of them.
_ADALORA_FIELDS = (
    frozenset({"beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"})
    | _LORA_FIELDS
)
_ADALORA_REFUSED = dict.fromkeys(
    (
        "enable_lora",
        "ensure_weight_tying",
        "lora_bias",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
    ),
    ("AdaLoRA has none of it in PEFT", "train without it"),
)

_LYCORIS = frozenset({"alpha", "alpha_pattern", "module_dropout", "r", "rank_dropout", "rank_pattern"}) | {
    "use_effective_conv2d"
}
_RANDOM = frozenset({"d_initial", "projection_prng_key", "r", "save_projection"})

METHODS: Mapping[str, Method] = {
    "LORA": Method(
        "LoRA",
        Names(LORA_TENSORS),
        lora,
        unread=frozenset({"lora_velora_embed"}),  # of VeLoRA's backward pass
        harmless=_LORA_FIELDS,
        refused=LORA_REFUSED,
        rank="r",
        alpha="lora_alpha",
        patterns=True,
    ),
    "ADALORA": Method(
        "AdaLoRA",
        Names(_bare("lora_A", "lora_B", "lora_E", "ranknum")),
        factors.adalora,
        harmless=_ADALORA_FIELDS - set(_ADALORA_REFUSED),
        refused=LORA_REFUSED | _ADALORA_REFUSED,
        rank="init_r",
        alpha="lora_alpha",
    ),
    "BOFT": Method(
        "BOFT",
        Names(_bare("boft_R", "boft_s")),
        weights.boft,
        harmless=frozenset({"boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor"}),
    ),
    "C3A": Method(
        "C3A", Names(_bare("c3a_kernel")), weights.c3a, harmless=frozenset({"block_size", "block_size_pattern"})
    ),
    "DELORA": Method(
        "DeLoRA",
        Names(_bare("delora_A", "delora_B", "delora_lambda", "delora_w_norm")),
        factors.delora,
        harmless=frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "r", "rank_pattern"}),
        rank="r",
        patterns=True,
    ),
    "FOURIERFT": Method(
        "FourierFT",
        Names(_bare("fourierft_spectrum")),
        weights.fourierft,
        harmless=frozenset({"n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling"}),
    ),
    "GRALORA": Method(
        "GraLoRA",
        Names(_bare("gralora_A", "gralora_B") | dict.fromkeys(("gralora_A_general", "gralora_B_general"), ("weight",))),
        factors.gralora,
        harmless=frozenset({"alpha", "gralora_dropout", "gralora_k", "hybrid_r", "r"}),
        rank="r",
        alpha="alpha",
    ),
    "HIRA": Method(
        "HiRA",
        Names(_bare("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")),
        weights.hira,
        harmless=frozenset({"hira_dropout", "r", "rank_pattern"}),
    ),
    "HRA": Method("HRA", Names(_bare("hra_u")), weights.hra, harmless=frozenset({"apply_GS", "r"}), rank="r"),
    "IA3": Method(
        "IA3",
        Names(_bare("ia3_l")),
        weights.ia3,
        harmless=frozenset({"feedforward_modules", "init_ia3_weights"}),
    ),
    "LN_TUNING": Method("LN tuning", Names({}), weights.whole_copies),
    "LOHA": Method(
        "LoHa",
        Names(_bare("hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        factors.loha,
        harmless=_LYCORIS,
        rank="r",
        alpha="alpha",
        patterns=True,
    ),
    "LOKR": Method(
        "LoKr",
        Names(_bare("lokr_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
        factors.lokr,
        harmless=_LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
        rank="r",
        alpha="alpha",
        patterns=True,
    ),
    "MISS": Method(
        "MiSS",
        Names(_bare("miss_block")),
        factors.miss,
        harmless=frozenset({"mini_r", "miss_dropout", "r"}),
        rank="r",
    ),
    "OFT": Method(
        "OFT",
        Names(dict.fromkeys(("oft_R", "oft_embedding_R"), ("weight",))),
        weights.oft,
        harmless=frozenset(
            {
                "block_share",
                "coft",
                "eps",
                "module_dropout",
                "num_cayley_neumann_terms",
                "oft_block_size",
                "r",
                "use_cayley_neumann",
            }
        ),
    ),
    "PVERA": Method(
        "PVeRA",
        Names(_bare("pvera_lambda_b", "pvera_lambda_d"), ("pvera_A", "pvera_B")),
        factors.pvera,
        harmless=_RANDOM | {"generator_seed", "pvera_dropout", "sample_at_inference"},
    ),
    "RANDLORA": Method(
        "RandLoRA",
        Names(_bare("randlora_A", "randlora_B", "randlora_gamma", "randlora_lambda"), ("randlora_A", "randlora_B")),
        factors.randlora,
        harmless=_RANDOM | {"randlora_alpha", "randlora_dropout", "sparse", "very_sparse"},
        rank="r",
        alpha="randlora_alpha",
    ),
    "SHIRA": Method(
        "SHiRA",
        Names(_bare("shira_indices", "shira_weight")),
        weights.shira,
        harmless=frozenset({"mask_type", "r", "random_seed"}),
        integers=frozenset({"shira_indices"}),
    ),
    "TRAINABLE_TOKENS": Method(
        "trained tokens",
        Names(_bare(TOKENS, TOKENS_BEFORE)),
        trainable_tokens,
        harmless=frozenset({"token_indices"}),
        unread=frozenset({TOKENS_BEFORE}),
    ),
    "VBLORA": Method(
        "VB-LoRA",
        Names(
            _bare(*(f"vblora_logits_{side}{end}" for side in "AB" for end in ("", "_topk_indices", "_topk_weights"))),
            ("vblora_vector_bank",),
        ),
        factors.vblora,
        harmless=frozenset(
            {
                "init_logits_std",
                "init_vector_bank_bound",
                "num_vectors",
                "r",
                "save_only_topk_weights",
                "topk",
                "vblora_dropout",
                "vector_length",
            }
        ),
        rank="r",
        integers=frozenset({"vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"}),
    ),
    "VERA": Method(
        "VeRA",
        Names(_bare("vera_lambda_b", "vera_lambda_d"), ("vera_A", "vera_B")),
        factors.vera,
        harmless=_RANDOM | {"init_vera_weights", "vera_dropout"},
    ),
}
