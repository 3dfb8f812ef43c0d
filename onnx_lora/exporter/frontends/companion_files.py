"""The files of a model's folder that make it usable, and that go into the package as they are: configs, tokenizers,
licenses. It knows their names, and reads none."""

from __future__ import annotations

from pathlib import Path

from onnx_lora.companions import leads_out
from onnx_lora.errors import ModelError

__all__ = ["COMPANIONS", "companions_of"]

COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "LICENSE*",
)

# JSON files that are not about the model as such.
_NOT_COMPANIONS = ("onnx_lora.json", "adapter_config.json", "trainer_state.json", "model.safetensors.index.json")


def companions_of(folder: Path) -> tuple[Path, ...]:
    """The configuration and tokenizer files of a model's folder. Raises ModelError: one is a link out of it."""
    found: set[Path] = set()
    for pattern in COMPANIONS:
        found.update(folder.glob(pattern))
    companions = [file for file in sorted(found) if file.is_file() and file.name not in _NOT_COMPANIONS]
    outside = [f"{file.name} → {file.resolve()}" for file in companions if leads_out(file, folder)]
    if outside:
        raise ModelError(
            "what comes along into the package must lie in the model's folder; put copies in the place of these links",
            path=folder,
            problems=outside,
        )
    return tuple(companions)
