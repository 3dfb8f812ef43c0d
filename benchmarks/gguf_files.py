"""GGUF files for llama.cpp: the benchmark's Llama, in f32 or Q4_0, and a PEFT adapter for it. Knows the names and the
rope of this one architecture, and no tokenizer: prompts are token ids.

    python -m benchmarks.gguf_files WORK        makes the files in f32 and compares llama.cpp with PEFT in PyTorch
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import load_file

from benchmarks.subject import make_adapter, make_checkpoint

__all__ = ["TYPES", "missing", "write_adapter", "write_model"]

Array = np.ndarray[Any, np.dtype[Any]]

# The packages it takes: one writes the files, the other runs them. Neither is a dependency of ours.
_PACKAGES = ("gguf", "llama_cpp")

# The type of every matrix at a precision of the benchmark, tied embeddings included; vectors stay in f32.
TYPES = {"fp32": "F32", "int4": "Q4_0"}

_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def write_model(checkpoint: Path, file: Path, type_name: str) -> Path:
    """The checkpoint's weights with every matrix in `type_name`, unless the file is there.

    Raises KeyError: a weight that this architecture does not have.
    """
    if file.exists():
        return file
    gguf = import_module("gguf")
    config = _config(checkpoint)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for key, weight in load_file(checkpoint / "model.safetensors").items():
        module = key.removesuffix(".weight")
        kind = gguf.GGMLQuantizationType[type_name if weight.ndim > 1 else "F32"]
        values = gguf.quants.quantize(_turned(weight, module, config), kind)
        writer.add_tensor(f"{_named(module)}.weight", values, raw_dtype=kind)
    return _written(writer, file)


def write_adapter(adapter: Path, checkpoint: Path, file: Path) -> Path:
    """A PEFT folder's LoRA factors in f32, unless the file is there. llama.cpp scales by alpha / rank, as PEFT does.

    Raises KeyError: a module that this architecture does not have.
    """
    if file.exists():
        return file
    writer = import_module("gguf").GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"])
    config = _config(checkpoint)
    for module, factor, weight in _factors(adapter):
        values = weight if factor == "A" else _turned(weight, module, config)
        writer.add_tensor(f"{_named(module)}.weight.lora_{factor.lower()}", values)
    return _written(writer, file)


def _config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config


def _factors(adapter: Path) -> Iterator[tuple[str, str, Array]]:
    """Module, "A" or "B", and the factor: A `[rank, in]`, B `[out, rank]`."""
    for key, weight in load_file(adapter / "adapter_model.safetensors").items():
        if not (match := _FACTOR.fullmatch(key)):
            raise KeyError(f"{adapter}: {key} is no factor of a LoRA")
        yield match[1], match[2], weight


def _named(module: str) -> str:
    if match := _LAYER.fullmatch(module):
        return f"blk.{match[1]}.{_OF_A_LAYER[match[2]]}"
    return _WHOLE[module]


def _turned(weight: Array, module: str, config: dict[str, Any]) -> Array:
    """`[out, ...]` with the rows of q and k in the order that llama.cpp's rope takes: it turns neighbours, and
    transformers the two halves of a head (`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py)."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = heads.get(module.rpartition(".")[2])
    if count is None:
        return weight
    halves = weight.reshape(count, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _written(writer: Any, file: Path) -> Path:
    part = file.with_name(f"{file.name}.part")
    writer.write_header_to_file(part)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.replace(file)


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
def main(work: Path) -> None:
    """Make the files in f32 and print how far llama.cpp's logits lie from PyTorch's, with an f32 cache."""
    checkpoint = make_checkpoint(work / "checkpoint")
    adapter = make_adapter(checkpoint, work / "all1", "all-linear", seed=1)
    model = write_model(checkpoint, work / "fp32.gguf", TYPES["fp32"])
    lora = write_adapter(adapter, checkpoint, work / "all1.gguf")
    prompt = np.random.default_rng(0).integers(3, _config(checkpoint)["vocab_size"], 32).tolist()
    base = _torch_logits(checkpoint, None, prompt)
    adapted = _torch_logits(checkpoint, adapter, prompt)
    click.echo(
        f"the adapter moves logits of up to {np.abs(base).max():.2f} by up to {np.abs(adapted - base).max():.2f}"
    )
    click.echo(f"base: differs by at most {np.abs(_llama_logits(model, None, prompt) - base).max():.1e}")
    click.echo(f"adapter: differs by at most {np.abs(_llama_logits(model, lora, prompt) - adapted).max():.1e}")


def _torch_logits(checkpoint: Path, adapter: Path | None, prompt: list[int]) -> Array:
    """`[tokens, vocabulary]`"""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(checkpoint)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits: Array = model.eval()(input_ids=torch.tensor([prompt])).logits[0].numpy()
    return logits


def _llama_logits(model: Path, lora: Path | None, prompt: list[int]) -> Array:
    """`[tokens, vocabulary]`"""
    llama_cpp = import_module("llama_cpp")
    f32 = llama_cpp.GGML_TYPE_F32
    path = None if lora is None else str(lora)
    llama = llama_cpp.Llama(str(model), lora_path=path, logits_all=True, type_k=f32, type_v=f32, verbose=False)
    llama.eval(prompt)
    logits: Array = llama.scores[: len(prompt)].copy()
    return logits


if __name__ == "__main__":
    main()
