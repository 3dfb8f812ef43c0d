"""A tokenizer for a checkpoint that has none. ONNX Runtime GenAI's builder loads one before anything else, only to see
whether it knows tokens for tools and for thinking."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_lora.exporter.frontends.configs.newer import copy_or_link

__all__ = ["has_tokenizer", "with_some_tokenizer"]

# One of these is in every folder with a tokenizer.
_TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe")

# One that knows no token but the unknown one.
_FILES = {
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
    },
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
}


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZERS)


@contextmanager
def with_some_tokenizer(checkpoint: Path, scratch: Path, built: Path) -> Iterator[Path]:
    """A folder of the checkpoint's files with a tokenizer beside them, in `scratch`. When the block ends, the builder's
    copies of that tokenizer are no more in the folder that it `built`."""
    folder = scratch / checkpoint.resolve().name
    shutil.copytree(checkpoint, folder, copy_function=copy_or_link)
    for name, content in _FILES.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    yield folder
    for pattern in _TOKENIZERS:
        for file in built.glob(pattern):
            file.unlink()
