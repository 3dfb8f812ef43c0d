"""Decoders with random weights as packages of both families, and PyTorch's own answers. How packages are made
stands here alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers as hf
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from onnx_lora import TextGenerator
from onnx_lora.exporter import export
from tests.support.models import make_adapter
from tests.support.once import made_once

__all__ = ["ARCHITECTURES", "FAMILIES", "Decoder", "open_generator"]

_SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
_GQA = _SHAPE | {"num_key_value_heads": 2}

# GroupQueryAttention wants heads of 16.
ARCHITECTURES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA)), ["q_proj", "v_proj", "down_proj"]),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GQA)), ["q_proj", "v_proj", "down_proj"]),
    "phi3": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SHAPE, original_max_position_embeddings=256)),
        ["qkv_proj", "down_proj"],
    ),
    "gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GQA, head_dim=16)), ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
            )
        ),
        ["c_attn"],
    ),
}

# Every decoder that each of them writes: "growing" by Optimum, "shared" by ONNX Runtime GenAI's builder.
FAMILIES = [
    *((name, "growing") for name in ARCHITECTURES),
    *((name, "shared") for name in ARCHITECTURES if name != "gpt2"),
]


@dataclass(frozen=True)
class Decoder:
    """A checkpoint, its package, and two adapters "a" and "b"."""

    checkpoint: Path
    package: Path
    adapters: dict[str, Path]

    def model(self, adapter: str | None = None) -> Any:
        model = hf.AutoModelForCausalLM.from_pretrained(self.checkpoint)
        return (model if adapter is None else PeftModel.from_pretrained(model, self.adapters[adapter])).eval()


Make = Callable[[str, str], Decoder]


def expected(model: Any, prompt: Sequence[int], tokens: int, **options: Any) -> list[int]:
    """What transformers writes, greedily, end tokens ignored."""
    ids = torch.tensor([list(prompt)])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    with torch.inference_mode():
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **settings)
    return [int(token) for token in written[0, len(prompt) :]]


def open_generator(decoder: Decoder, *names: str) -> TextGenerator:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    generator = TextGenerator(decoder.package, sess_options=options, providers=["CPUExecutionProvider"])
    for name in names:
        generator.load_adapter(name, decoder.adapters[name])
    return generator


def byte_tokenizer() -> Tokenizer:
    """100 tokens, byte by byte: the bytes that letters and common accents need, and a few merged words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Byte-level BPE writes bytes as characters: ASCII as itself, others by a table of 256.
    table = _byte_characters()
    wanted = [table[byte] for byte in sorted({*b" \nabcdefghijklmnopqrstuvwxyzABCDE.,!", *"éñ€😀".encode()})]
    assert set(wanted) <= set(alphabet)
    tokens = ["<pad>", "<s>", "</s>", "<|user|>", *wanted]
    merges = [(table[ord("t")], table[ord("h")]), (table[ord("t")] + table[ord("h")], table[ord("e")])]
    tokens += ["".join(pair) for pair in merges]
    tokens += [f"<unused{index}>" for index in range(100 - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<|user|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _byte_characters() -> dict[int, str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def fallback_tokenizer() -> Tokenizer:
    """As SentencePiece's models come: ▁ for a space, bytes where a character has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlortw", "▁hello", "▁a"]
    tokenizer = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|user|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}the {% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_checkpoint(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = ARCHITECTURES[name][0]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Larger than transformers makes them: a text must not repeat one token, as nearly linear models do.
            if parameter.ndim == 2 and "embed" not in key and "wte" not in key:
                parameter.mul_(15.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_package(checkpoint: Path, family: str, folder: Path) -> Path:
    """The only place that knows how packages of the two families come about."""
    export(checkpoint, folder / "package", via={"growing": "optimum", "shared": "genai"}[family], verify=False)
    return folder / "package"


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more time between threads than in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def decoders_of(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The decoder of an architecture in a family, made once a run."""

    def make(name: str, family: str) -> Decoder:
        trained = made_once(tmp_path_factory, f"decoder.{name}", lambda folder: _make_trained(name, folder))
        checkpoint = trained / "checkpoint"
        exported = made_once(
            tmp_path_factory, f"decoder.{name}.{family}", lambda folder: make_package(checkpoint, family, folder)
        )
        return Decoder(checkpoint, exported / "package", {"a": trained / "a", "b": trained / "b"})

    return make


def _make_trained(name: str, folder: Path) -> None:
    """A checkpoint and two adapters for it."""
    checkpoint = make_checkpoint(name, folder / "checkpoint")
    for adapter, seed, rank in (("a", 1, 4), ("b", 2, 2)):
        model = hf.AutoModelForCausalLM.from_pretrained(checkpoint)
        options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ARCHITECTURES[name][1]}
        make_adapter(model, folder / adapter, seed=seed, **options)


@pytest.fixture(scope="session", params=["growing", "shared"])
def decoder(request: pytest.FixtureRequest, decoders_of: Make) -> Decoder:
    """A Llama, in both families."""
    return decoders_of("llama", request.param)


@pytest.fixture
def generator(decoder: Decoder) -> TextGenerator:
    """With the adapters "a" and "b" loaded."""
    return open_generator(decoder, "a", "b")
