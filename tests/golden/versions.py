"""Checkpoints and adapters as transformers 4 and transformers 5 save them, with PEFT's own answers.

`python -m tests.golden.versions`, run with transformers 4 and then with 5, writes them anew. Both checkpoints hold the
same weights: the newer version has read the older one's, and saved them in its own way.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).parent
MAJOR = int(hf.__version__.partition(".")[0])
VERSIONS = (4, 5)

_CORE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_PICTURES: dict[str, Any] = _CORE | {"image_size": 16, "patch_size": 8, "num_labels": 3}
_WITHOUT_WIDTH = {name: value for name, value in _PICTURES.items() if name != "intermediate_size"}
_WORDS: dict[str, Any] = _CORE | {
    "vocab_size": 32,
    "max_position_embeddings": 32,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


def folder_of(name: str, version: int) -> Path:
    return HERE / f"transformers-{version}" / name


def _segformer() -> Any:
    config = hf.SegformerConfig(
        **{"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]},
        **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
        decoder_hidden_size=8,
    )
    return hf.SegformerForSemanticSegmentation(config)


def _swin() -> Any:
    stages = {"depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return hf.SwinForImageClassification(
        hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, num_labels=3, **stages)
    )


# By name: a model with random weights; and what LoRA is put on, where that is not every linear module but the head.
MODELS: dict[str, Any] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_PICTURES)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**_PICTURES)),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**_PICTURES)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_WITHOUT_WIDTH)),
    "swin": _swin,
    "segformer": _segformer,
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_WORDS)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_WORDS)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_WORDS)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_WORDS, **_EXPERTS, num_key_value_heads=1, head_dim=8)
    ),
}
TARGETS: dict[str, Any] = {
    "gpt_neox": ["query_key_value", "dense", "embed_out" if MAJOR < 5 else "lm_head"],
    # In transformers 5 experts and routers are no linear modules any more.
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        return {"pixel_values": torch.randn(2, 3, size, size)}
    tokens = torch.randint(3, 32, (2, 6))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _save(name: str) -> None:
    folder = folder_of(name, MAJOR)
    shutil.rmtree(folder, ignore_errors=True)
    if VERSIONS[0] == MAJOR:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    else:
        older = folder_of(name, VERSIONS[0])
        kind = getattr(hf, hf.AutoConfig.from_pretrained(older).architectures[0])
        model = kind.from_pretrained(older, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    if name == "dinov2":
        hf.BitImageProcessor(size={"height": 16, "width": 16}, crop_size=16).save_pretrained(folder)
    torch.manual_seed(MAJOR)
    heads = [head for head in ("classifier",) if hasattr(model, head)]
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=TARGETS.get(name, "all-linear"),
        init_lora_weights=False,
        modules_to_save=heads or None,
        base_model_name_or_path=name,
    )
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for own, parameter in wrapped.named_parameters():
            if "modules_to_save" in own:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # A path of this machine is no part of an adapter.
        wrapped.peft_config["default"].base_model_name_or_path = name
        inputs = inputs_of(model)
        answer = wrapped(**inputs).logits
        with wrapped.disable_adapter():
            base = wrapped(**inputs).logits
    wrapped.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    save_file({**inputs, "logits": answer.contiguous(), "base": base.contiguous()}, folder / "answer.safetensors")


if __name__ == "__main__":
    for model_name in MODELS:
        _save(model_name)
