"""Trains the demo's writer: one tiny Llama over plain English, frozen, and four LoRA adapters that change its style.

Knows the texts, PyTorch, transformers and PEFT; knows nothing of onnx_lora. In order:

1. a byte-level BPE vocabulary, learned from the base's texts;
2. the base, on sentences of films, questions and requests, one a line;
3. an adapter per style, its held-out loss measured through PEFT as it was saved, beside the base's;
4. samples: the same prompts under the base and under each adapter.

It takes about forty minutes on one core, and leaves the texts where they are:

    python examples/train_writer.py --data TEXTS --out writer

A base that OUT already holds is kept: remove OUT/checkpoint to train it again.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from _texts import Document, Source, read_english, read_styles
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
LENGTH = 128  # tokens a row of a batch; texts are packed, so that nothing is padding
LIMIT = 400_000  # bytes of an adapter: what a wheel carries for a demo
NEW_TOKENS = 40  # of a sample
NO_LABEL = -100  # what the loss leaves out

PAD, BOS, EOS = SPECIAL = ("<pad>", "<s>", "</s>")  # their positions are their ids
PROMPTS = ("The king", "I want", "What is")

CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=384,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: passes over the texts, rows a step, the highest learning rate."""

    passes: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Style:
    name: str
    says: str
    prompt: str
    plan: Plan
    rank: int
    alpha: int


PRETRAINING = Plan(passes=6, batch=16, rate=3e-3)

# Ranks and scales differ on purpose: whoever ignores one of them writes something else.
STYLES = (
    Style("shakespeare", "Dialogue in the manner of Shakespeare.", "The king", Plan(2, 8, 4e-3), rank=12, alpha=24),
    Style("names", "First names, one a line.", "Names for a child", Plan(5, 8, 4e-3), rank=8, alpha=16),
    Style(
        "molecules", "Molecules as SMILES strings, one a line.", "Try one of these", Plan(5, 8, 4e-3), rank=8, alpha=16
    ),
    Style("requests", "Requests to a device: music, tables, weather.", "I want", Plan(5, 8, 2e-3), rank=4, alpha=16),
)


def train_tokenizer(lines: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, CONFIG.bos_token_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONFIG.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: Any, documents: Iterable[Document]) -> Tensor:
    """Documents in one row after another, their ids and what of them is learned: [rows, 2, LENGTH]."""
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        prompt = tokenizer.encode(document.prompt, verbose=False)
        text = [*tokenizer.encode(document.text, add_special_tokens=False, verbose=False), CONFIG.eos_token_id]
        ids += prompt + text
        labels += [NO_LABEL] * len(prompt) + text
    count = len(ids) // LENGTH
    return torch.tensor([ids[: count * LENGTH], labels[: count * LENGTH]]).view(2, count, LENGTH).transpose(0, 1)


def descend(model: Any, tokenizer: Any, title: str, plan: Plan, sources: list[Source]) -> None:
    """Trains what of the model is not frozen."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    steps: list[Tensor] = []
    for _ in range(plan.passes):
        documents = [document for part in sources for document in part.documents(part.train, rng)]
        rows = pack(tokenizer, rng.sample(documents, len(documents)))
        steps += torch.split(rows[torch.randperm(len(rows))], plan.batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=len(steps), pct_start=0.05)
    model.train()
    with Progress(console=console) as progress:
        bar = progress.add_task(title, total=len(steps))
        for batch in steps:
            ids, labels = batch.unbind(1)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, description=f"{title}, loss {loss.item():.2f}")
    model.eval()


def held_out(model: Any, tokenizer: Any, part: Source) -> float:
    """Mean loss of a token, in nats."""
    rows = pack(tokenizer, part.documents(part.test, random.Random(SEED)))
    with torch.inference_mode():
        losses = [
            (float(model(input_ids=ids, labels=labels).loss), int((labels >= 0).sum()))
            for ids, labels in (batch.unbind(1) for batch in torch.split(rows, 32))
        ]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def samples(model: Any, tokenizer: Any, title: str, prompts: Iterable[str]) -> str:
    """What the model writes after each prompt, the likeliest and a drawn text."""
    texts = ""
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        for how in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 0}):
            torch.manual_seed(SEED)
            (ids,) = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **how)
            kind = "temperature 0.8" if how["do_sample"] else "greedy"
            texts += f"== {title}, {kind}: {prompt}\n{tokenizer.decode(ids, skip_special_tokens=True)}\n\n"
    return texts


def load_base(folder: Path) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    model.name_or_path = "onnx-lora-writer"  # what PEFT writes down as the base, in place of this machine's path
    return model


def make_base(folder: Path, english: dict[str, Source]) -> None:
    tokenizer = train_tokenizer(line for part in english.values() for line in part.train)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(CONFIG)
    descend(model, tokenizer, "base", PRETRAINING, list(english.values()))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def make_adapter(folder: Path, base: Path, tokenizer: Any, style: Style, part: Source) -> None:
    """LoRA on every linear layer, written as float16: half the bytes. Raises ClickException: over LIMIT bytes."""
    torch.manual_seed(SEED)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=style.rank, lora_alpha=style.alpha)
    model = get_peft_model(load_base(base), config)
    descend(model, tokenizer, style.name, style.plan, [part])
    model.half().save_pretrained(folder, save_embedding_layers=False)  # PEFT would ask the hub whether they changed
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    size = (folder / "adapter_model.safetensors").stat().st_size
    if size > LIMIT:
        raise click.ClickException(f"{folder} must hold at most {LIMIT} bytes, it holds {size}: lower its rank.")


FOLDER = click.Path(path_type=Path, file_okay=False)
READABLE = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--data", type=READABLE, required=True, help="The folder of the texts, ../shared/data/text.")
@click.option("--out", type=FOLDER, required=True, help="Its adapters are overwritten, its base is kept.")
def main(data: Path, out: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # the same sums in the same order on every machine of a kind
    english = read_english(data)
    parts = read_styles(data, english)
    base = out / "checkpoint"
    if not (base / "model.safetensors").exists():
        make_base(base, english)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = load_base(base)
    for name, part in english.items():
        console.print(f"base, {name}: held-out loss {held_out(model, tokenizer, part):.3f}")
    texts, tasks = samples(model, tokenizer, "base", dict.fromkeys([*PROMPTS, *(style.prompt for style in STYLES)])), {}
    for style in STYLES:
        folder, part = out / "adapters" / style.name, parts[style.name]
        make_adapter(folder, base, tokenizer, style, part)
        adapted = PeftModel.from_pretrained(load_base(base), folder).eval()
        tasks[style.name] = {
            "says": style.says,
            "prompt": style.prompt,
            "loss_base": round(held_out(model, tokenizer, part), 3),
            "loss_adapter": round(held_out(adapted, tokenizer, part), 3),
        }
        console.print(style.name, tasks[style.name])
        texts += samples(adapted, tokenizer, style.name, dict.fromkeys([*PROMPTS, style.prompt]))
    (out / "samples.txt").write_text(texts, encoding="utf-8")
    (out / "tasks.json").write_text(json.dumps(tasks, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
