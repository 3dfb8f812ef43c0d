"""Bases for adapters that people published: random weights, the adapters' own dimensions, and everything that no
tensor of theirs touches as small as it goes. The bases that are no transformers models are PEFT's own tests'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers as hf
from torch import nn

from onnx_lora import Package
from onnx_lora.exporter import export
from onnx_lora.exporter.frontends.torch_module import reference
from tests.support.exporters import VIA, load_model
from tests.support.exporters import references as onnx_references

__all__ = ["BASES", "Answers", "Base"]

_WORDS = 64  # the vocabulary; adapters of embeddings are refused before they meet a base
_TOKENS = 64  # positions
_FFN = 32  # feed-forward width where it has no adapter
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Answers:
    """Inputs of one graph, and what PyTorch answers to them: the base, and the base changed as asked."""

    graph: str
    feeds: Arrays
    base: Arrays
    changed: Arrays


@dataclass(frozen=True)
class Base:
    """How to make a model, always with the same random weights. `example`: inputs where it is not transformers'."""

    make: Callable[[], Any]
    example: Callable[[], torch.Tensor] | None = None

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval()

    def export(self, folder: Path, **options: Any) -> Package:
        """Write checkpoint and package into `folder`."""
        package, model = folder / "package", self.model()
        if self.example is not None:
            return export(model, package, example_inputs=(self.example(),), verify=False, **options)
        model.save_pretrained(folder / "checkpoint")
        del model  # the largest has 1.6 GB
        return export(folder / "checkpoint", package, via=VIA, verify=False, **options)

    def answers(self, folder: Path, package: Package, change: Callable[[Any], object]) -> list[Answers]:
        """What the model answers before and after `change`, for every graph of its package in `folder`."""
        if self.example is not None:
            model = self.model()
            references = [reference(model, _names(package, "model")[1], (self.example(),))]
        else:
            model, task = load_model(folder / "checkpoint", task=None)
            # Optimum's inputs are random. Rounding grows through 24 layers by as much as the inputs let it: PEFT in
            # float32, merged, is 5e-6 to 3e-5 away from PEFT in float64; with these inputs it is the former.
            hf.set_seed(0)
            references = onnx_references(model, task)
        before = [(each.feeds(_names(package, each.graph)[0]), each.answer()) for each in references]
        change(model)
        model.eval()
        return [
            Answers(each.graph, feeds, base, each.answer())
            for each, (feeds, base) in zip(references, before, strict=True)
        ]


def _names(package: Package, graph: str) -> tuple[list[str], list[str]]:
    """A base graph's inputs and outputs."""
    proto = onnx.load(package.path / package.graph(graph).base_file, load_external_data=False).graph
    return [value.name for value in proto.input], [value.name for value in proto.output]


class MLP(nn.Module):
    """PEFT's tests/regression/test_regression.py, without its dropout; so are the next two."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(x).relu()).log_softmax(dim=-1)


class ModelConv2D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(5, 10, 3)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.conv2d(x).relu().flatten(1)).log_softmax(dim=-1)


class ModelEmbConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = hf.pytorch_utils.Conv1D(1, 5)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.conv1d(self.emb(x)).relu().flatten(1)).log_softmax(dim=-1)


def _bert() -> Any:
    config = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": _FFN}
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=_WORDS, max_position_embeddings=_TOKENS, **config))


def _bloom() -> Any:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=_WORDS, hidden_size=1024, n_layer=24, n_head=16, **_SPECIAL))


def _distilbert(labels: int) -> Any:
    config = {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": _FFN, "num_labels": labels}
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=_WORDS, max_position_embeddings=_TOKENS, **config)
    )


def _roberta() -> Any:
    config = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": _FFN}
    return hf.RobertaForSequenceClassification(
        hf.RobertaConfig(vocab_size=_WORDS, max_position_embeddings=_TOKENS, num_labels=6, **config)
    )


def _gpt2(*, ffn: int = _FFN, labels: int = 0) -> Any:
    config = hf.GPT2Config(
        vocab_size=_WORDS,
        n_positions=_TOKENS,
        n_embd=768,
        n_layer=12,
        n_head=12,
        n_inner=ffn,
        num_labels=max(labels, 2),
        **_SPECIAL,
    )
    return hf.GPT2ForSequenceClassification(config) if labels else hf.GPT2LMHeadModel(config)


def _gpt_neo() -> Any:
    return hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=_WORDS,
            max_position_embeddings=_TOKENS,
            hidden_size=768,
            num_layers=12,
            num_heads=12,
            intermediate_size=_FFN,
            attention_types=[[["global", "local"], 6]],
            **_SPECIAL,
        )
    )


def _gpt_neox() -> Any:
    config = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": _FFN}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=_WORDS, max_position_embeddings=_TOKENS, **config))


def _llama() -> Any:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=_WORDS,
            max_position_embeddings=_TOKENS,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=_FFN,
        )
    )


def _gemma3() -> Any:
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            vocab_size=_WORDS,
            max_position_embeddings=_TOKENS,
            hidden_size=640,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            intermediate_size=_FFN,
            sliding_window=32,
            **_SPECIAL,
        )
    )


def _opt() -> Any:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=_WORDS,
            max_position_embeddings=_TOKENS,
            hidden_size=768,
            word_embed_proj_dim=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            ffn_dim=_FFN,
            **_SPECIAL,
        )
    )


def _t5() -> Any:
    config = {"d_model": 512, "d_kv": 64, "d_ff": _FFN, "num_layers": 6, "num_heads": 8}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=_WORDS, decoder_start_token_id=0, **config))


def _segformer() -> Any:
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(num_labels=150, mlp_ratios=[1, 1, 1, 1]))


def _vit() -> Any:
    config = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": _FFN}
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=32, num_labels=101, **config))


def _whisper() -> Any:
    layers = {"encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 12, "decoder_attention_heads": 12}
    config = hf.WhisperConfig(
        vocab_size=_WORDS,
        d_model=768,
        encoder_ffn_dim=_FFN,
        decoder_ffn_dim=_FFN,
        max_target_positions=_TOKENS,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **layers,
        **_SPECIAL,
    )
    return hf.WhisperForConditionalGeneration(config)


BASES: dict[str, Base] = {
    "bert": Base(_bert),
    "bloom": Base(_bloom),
    "distilbert, 2 labels": Base(lambda: _distilbert(2)),
    "distilbert, 6 labels": Base(lambda: _distilbert(6)),
    "gemma3": Base(_gemma3),
    "gpt2": Base(_gpt2),
    "gpt2, wide": Base(lambda: _gpt2(ffn=3072)),
    "gpt2, 6 labels": Base(lambda: _gpt2(labels=6)),
    "gpt2, 10 labels": Base(lambda: _gpt2(labels=10)),
    "gpt_neo": Base(_gpt_neo),
    "gpt_neox": Base(_gpt_neox),
    "llama": Base(_llama),
    "opt": Base(_opt),
    "roberta": Base(_roberta),
    "segformer": Base(_segformer),
    "t5": Base(_t5),
    "vit": Base(_vit),
    "whisper": Base(_whisper),
    "mlp": Base(MLP, lambda: torch.linspace(-2, 2, 30).view(3, 10)),
    "conv2d": Base(ModelConv2D, lambda: torch.linspace(-2, 2, 135).view(3, 5, 3, 3)),
    "embedding": Base(ModelEmbConv1D, lambda: torch.arange(30).view(3, 10)),
}
