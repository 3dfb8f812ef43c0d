"""What is measured: a Llama of SmolLM2-135M's shape with random weights, and random rank-16 adapters for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

__all__ = ["Q_AND_V", "make_adapter", "make_checkpoint", "make_tokenizer"]

Q_AND_V = ["q_proj", "v_proj"]

# config.json of HuggingFaceTB/SmolLM2-135M
_SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def make_checkpoint(folder: Path) -> Path:
    """The model as `save_pretrained` writes it: 538 MB in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**_SHAPE)).save_pretrained(folder)
    return folder


def make_tokenizer(checkpoint: Path) -> Path:
    """A tokenizer of a few words beside the model; ONNX Runtime GenAI opens no folder without one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not (checkpoint / "tokenizer.json").exists():
        words = Tokenizer(models.BPE())
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(special.values()), initial_alphabet=alphabet)
        words.train_from_iterator(["hello world, this is a test"] * 10, trainer)
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(checkpoint)
    return checkpoint


def make_adapter(checkpoint: Path, folder: Path, targets: str | list[str], *, seed: int) -> Path:
    """A PEFT adapter of rank 16 with random A and B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    if not (folder / "adapter_config.json").exists():
        model = LlamaForCausalLM.from_pretrained(checkpoint)
        torch.manual_seed(seed)
        config = LoraConfig(r=16, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder)
    return folder
