"""The demo's second part: a tiny language model writes on behind one prompt, every row of the batch under another
adapter, and all of them at once.

It uses the package as any user would, and checks what it claims."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lora.errors import InputError
from onnx_lora.exporter import attach
from onnx_lora.runtime import Sampling, TextGenerator
from onnx_lora.staging import scratch

__all__ = ["BASE", "WRITER", "WriterResult", "Written", "run_writer"]

# The model and its adapters, as examples/train_writer.py made them: 8 bits, by ONNX Runtime GenAI's builder.
WRITER = Path(__file__).parent / "demo_writer"

# What the row without an adapter is called.
BASE = "no adapter"

_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Written:
    """What one row wrote."""

    name: str
    """Its adapter."""

    says: str
    """What the adapter was trained on."""

    text: str
    """What it wrote."""

    alone: bool
    """Whether the row wrote the same in a batch of its own."""


@dataclass(frozen=True, slots=True)
class WriterResult:
    """One text, continued by all rows of one batch."""

    prompt: str
    """The text."""

    rows: tuple[Written, ...]
    """What each row wrote."""

    tokens_per_second: float
    """Tokens of all rows together."""

    base_bytes: int
    """The size of the base model."""

    adapter_bytes: int
    """The size of all adapters together."""

    package: str | None
    """The package's folder; None where it was not kept."""


def run_writer(
    prompt: str | None = None,
    *,
    seed: int = 7,
    keep: Path | None = None,
    show: Callable[[dict[str, str]], object] = lambda _: None,
) -> WriterResult:
    """Attach points to the embedded model and stream a text under every adapter, in one batch.

    `show`: called after every round with what the rows have written so far, by adapter.

    Raises MissingDependencyError: `tokenizers` is not installed. OutputExistsError: `keep` exists.
    """
    facts = _read_facts()
    said = facts["prompt"] if prompt is None else prompt
    if not said.strip():
        raise InputError("the prompt must hold a text, and is empty")
    sampling = Sampling(_TOKENS, temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=seed)
    with scratch() as place:
        folder = keep or place / "package"
        attach(WRITER / "model", folder)
        generator = TextGenerator(folder)
        names: dict[str, str | None] = {BASE: None}
        for name in facts["adapters"]:
            generator.load_adapter(name, WRITER / "adapters" / name)
            names[name] = name
        texts = dict.fromkeys(names, said)
        tokens, start = 0, time.perf_counter()
        with generator.stream([said] * len(names), adapter=list(names.values()), sampling=sampling) as stream:
            for piece in stream:
                tokens += 1
                texts[list(names)[piece.row]] += piece.text
                show(texts)
        seconds = time.perf_counter() - start
        greedy = Sampling(_TOKENS)
        together = generator.generate([said] * len(names), adapter=list(names.values()), sampling=greedy)
        rows: list[Written] = []
        for (name, adapter), row in zip(names.items(), together, strict=True):
            alone = generator.generate(said, adapter=adapter, sampling=greedy)
            says = facts["adapters"].get(name, facts["base"])["says"]
            rows.append(Written(name, says, texts[name], alone=alone.tokens == row.tokens))
    return WriterResult(
        prompt=said,
        rows=tuple(rows),
        tokens_per_second=tokens / seconds,
        base_bytes=_count_bytes(WRITER / "model"),
        adapter_bytes=_count_bytes(WRITER / "adapters"),
        package=None if keep is None else str(keep),
    )


def _read_facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((WRITER / "writer.json").read_text("utf-8"))
    return facts


def _count_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
