"""Small pipelines with random weights, and a package with the shapes of a large one and no weights to speak of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers as df
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from onnx_lora.kinds import LINEAR, Conv, Kind
from onnx_lora.manifest import FORMAT_VERSION, MANIFEST, GraphInfo, Manifest
from onnx_lora.package import Package
from onnx_lora.points import Branch, InjectionPoint, StoredTensor, WeightPart

__all__ = [
    "make_pipeline",
    "make_style",
    "make_xl_pipeline",
    "shaped_package",
    "stable_diffusion_1",
    "stable_diffusion_2",
]

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
_TEXT: dict[str, Any] = {
    "vocab_size": len(_WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 24,
    "bos_token_id": _WORDS.index("<|startoftext|>"),
    "eos_token_id": _WORDS.index("<|endoftext|>"),
    "pad_token_id": _WORDS.index("<|endoftext|>"),
}
_UNET: dict[str, Any] = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 32}


def make_pipeline(folder: Path, *, networks: Mapping[str, nn.Module] | None = None) -> Any:
    """Stable Diffusion's parts: a UNet of 0.8M parameters, one text encoder, a VAE, a scheduler, a tokenizer.

    `networks`: a UNet and a text encoder without weights in the place of the small ones; they get random ones.
    """
    torch.manual_seed(0)
    for network in (networks or {}).values():
        _fill(network.to_empty(device="cpu"))
    pipeline = df.StableDiffusionPipeline(
        vae=_vae(),
        **(networks or _small()),
        tokenizer=_tokenizer(folder),
        scheduler=df.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def _small() -> dict[str, nn.Module]:
    unet = df.UNet2DConditionModel(
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    return {"unet": unet, "text_encoder": hf.CLIPTextModel(hf.CLIPTextConfig(**_TEXT))}


@torch.no_grad()
def _fill(network: nn.Module) -> None:
    """Weights that keep the size of what they multiply; norms are ones and biases zeros."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.fill_(1)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.zero_()
    for buffer in network.buffers():  # CLIP's positions
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))


def make_xl_pipeline(folder: Path) -> Any:
    """SDXL's parts: two text encoders whose modules have the same names, and a UNet that takes their outputs."""
    torch.manual_seed(0)
    unet = df.UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    tokenizer = _tokenizer(folder)
    pipeline = df.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=hf.CLIPTextModel(hf.CLIPTextConfig(**_TEXT)),
        text_encoder_2=hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**_TEXT)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=df.EulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder)
    return pipeline


def _vae() -> Any:
    return df.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def _tokenizer(folder: Path) -> Any:
    """Letters, and one word: "the"."""
    files = folder.parent / f"{folder.name}.vocab.json", folder.parent / f"{folder.name}.merges.txt"
    files[0].write_text(json.dumps({word: index for index, word in enumerate(_WORDS)}), "utf-8")
    files[1].write_text("#version: 0.2\nt h\nth e</w>\n", "utf-8")
    return hf.CLIPTokenizer(*map(str, files), model_max_length=16)


def make_style(pipeline: Any, file: Path, *, seed: int = 1) -> Path:
    """A file of diffusers' with a random LoRA for the UNet's attention and convolutions, and for the text encoder.

    The pipeline keeps none of it.
    """
    layers = {
        "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut"],
        "text_encoder": ["q_proj", "v_proj", "fc1"],
    }
    saved: dict[str, Any] = {}
    torch.manual_seed(seed)
    for name, targets in layers.items():
        network = getattr(pipeline, name)
        config = LoraConfig(r=3, lora_alpha=2 + seed, target_modules=targets, init_lora_weights=False)
        network.add_adapter(config)
        saved[f"{name}_lora_layers"] = get_peft_model_state_dict(network, adapter_name="default")
        saved[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
        network.delete_adapters(["default"]) if name == "unet" else network.delete_adapter("default")
    file.parent.mkdir(parents=True, exist_ok=True)
    pipeline.save_lora_weights(file.parent, weight_name=file.name, **saved)
    return file


def stable_diffusion_1() -> dict[str, nn.Module]:
    """The networks of Stable Diffusion 1.5 that adapters are trained for, without weights: 860M and 123M parameters."""
    with torch.device("meta"):
        text = hf.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=49408)
        unet = df.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        return {"unet": unet, "text_encoder": hf.CLIPTextModel(text)}


def stable_diffusion_2() -> dict[str, nn.Module]:
    """The UNet of Stable Diffusion 2.1, without weights."""
    heads = (5, 10, 20, 20)
    with torch.device("meta"):
        return {
            "unet": df.UNet2DConditionModel(
                sample_size=96, cross_attention_dim=1024, attention_head_dim=heads, use_linear_projection=True
            )
        }


def shaped_package(folder: Path, networks: Mapping[str, nn.Module]) -> Package:
    """A package with a point for every linear module and convolution of `networks`, as exporting them would give;
    its graphs are empty, and its weights are zeros that take no room on a disk."""
    folder.mkdir()
    graphs, end = [], 0
    for name, network in networks.items():
        points = []
        for module, layer in _layers(network):
            points.append(_point(f"{name}.{module}", layer, end))
            end += points[-1].parts[0].stored.size
        branches = tuple(Branch((point.module,)) for point in points)
        graphs.append(GraphInfo(name, f"{name}.onnx", f"base.{name}.onnx", tuple(points), branches))
        for file in (graphs[-1].file, graphs[-1].base_file):
            (folder / file).write_bytes(b"\0")
    with (folder / "model.onnx.data").open("wb") as file:
        file.truncate(end)
    (folder / MANIFEST).write_text(Manifest(FORMAT_VERSION, "a test", {}, tuple(graphs)).to_json(), "utf-8")
    return Package.open(folder)


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for module, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield module, layer


def _point(module: str, layer: nn.Linear | nn.Conv2d, offset: int) -> InjectionPoint:
    shape = tuple(layer.weight.shape)
    kind: Kind = Conv(shape[2:]) if isinstance(layer, nn.Conv2d) else LINEAR
    stored = StoredTensor("model.onnx.data", offset, shape, "float32")
    return InjectionPoint(
        module=module,
        in_features=math.prod(shape[1:]),
        out_features=shape[0],
        dtype="float32",
        per_row=True,
        sha256="0" * 64,
        parts=(WeightPart(f"{module}.weight", stored, shape[0], transposed=True),),
        kind=kind,
        bias="none" if layer.bias is None else "added",
    )
