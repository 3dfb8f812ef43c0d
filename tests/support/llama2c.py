"""A Llama in the first layout of karpathy/llama2.c, as transformers' model and its tokenizer. Knows no ONNX."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["Tokens", "read_model", "read_tokens"]

_HEADER = "<7i"  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len


def read_model(path: Path) -> Any:
    """The model in evaluation mode; its output layer is the embeddings', as in every small llama2.c model."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from(_HEADER, data)
    floats = np.frombuffer(data, np.float32, offset=struct.calcsize(_HEADER))
    kv = dim // heads * kv_heads
    # In the file's order; each of a layer's for all layers in a row.
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (vocabulary, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, kv, dim),
        "self_attn.v_proj": (layers, kv, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,),
    }
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        values, floats = floats[: np.prod(shape)].reshape(shape), floats[np.prod(shape) :]
        if name in ("embed_tokens", "norm"):
            state[f"model.{name}.weight"] = torch.tensor(values)
            continue
        for layer, weight in enumerate(values):
            if name.endswith(("q_proj", "k_proj")):
                weight = _halved(weight, dim // heads)
            state[f"model.layers.{layer}.{name}.weight"] = torch.tensor(weight)
    assert floats.size == length * (dim // heads), "only the rotary tables may be left"
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halved(weight: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """llama2.c rotates neighbours, transformers the halves of a head: the even outputs go before the odd ones."""
    return weight.reshape(-1, size // 2, 2, weight.shape[1]).transpose(0, 2, 1, 3).reshape(weight.shape)


@dataclass(frozen=True)
class Tokens:
    """llama2.c's byte-pair encoder: the pair of best score is joined first."""

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]

    def encode(self, text: str) -> list[int]:
        """With the start of a text (1) and the space that the encoder puts in front."""
        ids = {piece: index for index, piece in reversed(list(enumerate(self.pieces)))}
        found = [ids[character.encode()] for character in f" {text}"]
        while True:
            pairs = [self.pieces[left] + self.pieces[right] for left, right in pairwise(found)]
            known = [(self.scores[ids[pair]], -at) for at, pair in enumerate(pairs) if pair in ids]
            if not known:
                return [1, *found]
            at = -max(known)[1]
            found[at : at + 2] = [ids[pairs[at]]]

    def save_pretrained(self, folder: Path) -> None:
        """The same encoder as transformers reads it."""
        from tokenizers import Tokenizer, models, normalizers, processors
        from transformers import PreTrainedTokenizerFast

        texts = [piece.decode("utf-8", "replace") for piece in self.pieces]
        ids = {text: index for index, text in reversed(list(enumerate(texts)))}
        best = sorted(range(len(texts)), key=lambda index: -self.scores[index])
        cuts = [(texts[index][:at], texts[index][at:]) for index in best for at in range(1, len(texts[index]))]
        merges = [(left, right) for left, right in cuts if left in ids and right in ids]
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=texts[0]))
        tokenizer.normalizer = normalizers.Prepend(" ")
        tokenizer.post_processor = processors.TemplateProcessing(single="S $A", special_tokens=[("S", 1)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[index] for index in ids).decode()


def read_tokens(path: Path) -> Tokens:
    data = path.read_bytes()
    pieces, scores, offset = [], [], 4
    while offset < len(data):
        score, size = struct.unpack_from("<fi", data, offset)
        offset += 8
        pieces.append(data[offset : offset + size])
        scores.append(score)
        offset += size
    return Tokens(tuple(pieces), tuple(scores))
