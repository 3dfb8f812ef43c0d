"""What a package's own files say about generating: end tokens, context, names of inputs. It knows Hugging Face's
and ONNX Runtime GenAI's files, no graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lora.errors import PackageError

__all__ = ["Names", "Settings", "read_object"]

_GENAI = "genai_config.json"
_GENERATION = "generation_config.json"
_CONFIG = "config.json"

# The names of "how many positions" in config.json, by family of models.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class Names:
    """What a decoder's inputs and outputs are called; `%d` is the layer."""

    ids: str = "input_ids"
    mask: str = "attention_mask"
    positions: str = "position_ids"
    past: tuple[str, str] = ("past_key_values.%d.key", "past_key_values.%d.value")
    present: tuple[str, str] = ("present.%d.key", "present.%d.value")
    logits: str = "logits"


@dataclass(frozen=True, slots=True)
class Settings:
    """`end`: tokens that end a text. `context`: how many tokens a text may have; None where nobody says.
    `head_size`: of a key or value, where the graph leaves it open."""

    names: Names
    end: frozenset[int]
    context: int | None
    head_size: int | None

    @staticmethod
    def read(folder: Path) -> Settings:
        """Raises PackageError: a file is damaged, or says what cannot be."""
        genai = _section(read_object(folder / _GENAI), "model")
        config = read_object(folder / _CONFIG)
        config = {**config, **_section(config, "text_config")}
        decoder = _section(genai, "decoder")
        ends = [genai, read_object(folder / _GENERATION), config]
        end: object = next((each["eos_token_id"] for each in ends if each.get("eos_token_id") is not None), [])
        contexts = [genai.get("context_length"), *(config.get(key) for key in _CONTEXT_KEYS)]
        heads = config.get("num_attention_heads")
        sizes = [decoder.get("head_size"), config.get("head_dim")]
        if _count(heads) and _count(config.get("hidden_size")):
            sizes.append(config["hidden_size"] // heads)
        return Settings(
            names=_names(_section(decoder, "inputs"), _section(decoder, "outputs")),
            end=_tokens(end, folder),
            context=next((each for each in contexts if _count(each)), None),
            head_size=next((each for each in sizes if _count(each)), None),
        )


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file. Raises PackageError: it is damaged."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"must be JSON, and cannot be read: {error}; copy it again", path=file) from error
    if not isinstance(content, dict):
        raise PackageError(f"must hold a JSON object, and holds a {type(content).__name__}", path=file)
    return content


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _tokens(end: object, folder: Path) -> frozenset[int]:
    tokens = end if isinstance(end, list) else [end]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise PackageError(f"eos_token_id must be a token id or a list of them, and is {end!r}", path=folder)
    return frozenset(tokens)


def _names(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Names:
    usual = Names()

    def named(content: Mapping[str, Any], key: str, default: str) -> str:
        name = content.get(key, default)
        return name if isinstance(name, str) else default

    return Names(
        ids=named(inputs, "input_ids", usual.ids),
        mask=named(inputs, "attention_mask", usual.mask),
        positions=named(inputs, "position_ids", usual.positions),
        past=(
            named(inputs, "past_key_names", usual.past[0]),
            named(inputs, "past_value_names", usual.past[1]),
        ),
        present=(
            named(outputs, "present_key_names", usual.present[0]),
            named(outputs, "present_value_names", usual.present[1]),
        ),
        logits=named(outputs, "logits", usual.logits),
    )
