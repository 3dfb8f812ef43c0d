"""llama.cpp's names of tensors, and Hugging Face's for the same modules, by architecture: one table, read in both
directions. The reference is `gguf.tensor_mapping` and llama.cpp's `convert_hf_to_gguf.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "HEADS", "MODEL_TYPES", "Architecture"]

# Where a GGUF model says how many heads it has, by the field of Hugging Face's config; ours put it in adapters too.
HEADS = {
    "num_attention_heads": "{}.attention.head_count",
    "num_key_value_heads": "{}.attention.head_count_kv",
}

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_ATTENTION = {key: name for key, name in _LLAMA.items() if "ffn" not in key}
_TIED = {key: name for key, name in _LLAMA.items() if key != "output"}
_PHI3 = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_PHI2 = {
    **_ATTENTION,
    "blk.{}.attn_output": "model.layers.{}.self_attn.dense",
    "blk.{}.ffn_up": "model.layers.{}.mlp.fc1",
    "blk.{}.ffn_down": "model.layers.{}.mlp.fc2",
}
_STARCODER2 = {
    **_ATTENTION,
    "blk.{}.ffn_up": "model.layers.{}.mlp.c_fc",
    "blk.{}.ffn_down": "model.layers.{}.mlp.c_proj",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "output": "lm_head",
    "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
    "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
    "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
    "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
}

# What `permute` of llama.cpp's converter reorders in the architectures that have `undo_permute`.
_QUERY, _KEY = "attn_q", "attn_k"


@dataclass(frozen=True)
class Architecture:
    """`names`: theirs to Hugging Face's, `{}` for the layer's number. `permuted`: the rows of q and k are in another
    order there, each head's two halves interleaved."""

    names: Mapping[str, str]
    permuted: bool = False

    def to_module(self, name: str) -> str | None:
        """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj`; None: no such name is known."""
        if not name.endswith(".weight"):
            return None
        return _translate(name.removesuffix(".weight"), self.names)

    def from_module(self, module: str) -> str | None:
        """`model.layers.3.self_attn.q_proj` as `blk.3.attn_q.weight`; None: llama.cpp has no name for it."""
        name = _translate(module, {own: theirs for theirs, own in self.names.items()})
        return None if name is None else f"{name}.weight"

    def heads_of(self, name: str) -> str | None:
        """The field of Hugging Face's config that counts the heads by which a tensor's rows are ordered; None: they are
        in PyTorch's order."""
        part = name.removesuffix(".weight").rpartition(".")[2]
        if not self.permuted or part not in (_QUERY, _KEY):
            return None
        return "num_attention_heads" if part == _QUERY else "num_key_value_heads"


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    """What a table has for a name, with the layer's number put in; None: nothing."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return table.get(name)
    known = table.get(f"{name[: number.start()]}{{}}{name[number.end() :]}")
    return None if known is None else known.format(number[0])


# By `general.architecture`, and by `model_type` of Hugging Face's config.
ARCHITECTURES = {
    "llama": Architecture(_LLAMA, permuted=True),
    "granite": Architecture(_LLAMA, permuted=True),
    "smollm3": Architecture(_LLAMA, permuted=True),
    "qwen2": Architecture(_LLAMA),
    "qwen3": Architecture(_LLAMA),
    "gemma": Architecture(_TIED),
    "gemma2": Architecture(_TIED),
    "gemma3": Architecture(_LLAMA),
    "phi2": Architecture(_PHI2),
    "phi3": Architecture(_PHI3),
    "starcoder2": Architecture(_STARCODER2),
    "gpt2": Architecture(_GPT2),
}
MODEL_TYPES = {name: name for name in ARCHITECTURES if name != "phi2"} | {
    "mistral": "llama",
    "phi": "phi2",
    "gemma3_text": "gemma3",
}
