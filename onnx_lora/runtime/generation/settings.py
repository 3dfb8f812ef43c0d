"""What a package's own files say about generating: end tokens, context, names of inputs. It knows Hugging Face's
and ONNX Runtime GenAI's files, no graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lora.errors import PackageError, printable

__all__ = ["MOST", "Names", "Settings", "read_object", "read_text"]

_GENAI = "genai_config.json"
_GENERATION = "generation_config.json"
_CONFIG = "config.json"

# More than any of these files has. JSON of this length can take 400 MB of memory, and does not in practice.
_LONGEST = 16 * 2**20  # characters

# The names of "how many positions" in config.json, by family of models.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")

# Where a cache's names have their layer.
_LAYER = "%d"

# A hundred times what models have; beyond lies no model, and memory that nobody has.
MOST = {
    "context": 2**31 - 1,  # tokens: positions may be int32
    "hidden": 2**24,
    "heads": 2**16,
    "head_size": 2**16,
    "layers": 2**16,
    "vocabulary": 2**24,  # tokens
}


@dataclass(frozen=True, slots=True)
class Names:
    """What a decoder's inputs and outputs are called; `past` and `present` have a `%d` each, for the layer."""

    ids: str = "input_ids"
    mask: str = "attention_mask"
    positions: str = "position_ids"
    past: tuple[str, str] = ("past_key_values.%d.key", "past_key_values.%d.value")
    present: tuple[str, str] = ("present.%d.key", "present.%d.value")
    logits: str = "logits"

    def layer(self, index: int) -> list[tuple[str, str]]:
        """A layer's inputs, each with the output that is its next value: keys, values."""
        names: list[tuple[str, str]] = []
        for past, present in zip(self.past, self.present, strict=True):
            names.append((past.replace(_LAYER, str(index)), present.replace(_LAYER, str(index))))
        return names


@dataclass(frozen=True, slots=True)
class Settings:
    """`end`: tokens that end a text. `context`: how many tokens a text may have; `layers`: how many the cache has; None
    where nobody says. `head_size`: of a key or value, where the graph leaves it open."""

    names: Names
    end: frozenset[int]
    context: int | None
    head_size: int | None
    layers: int | None

    @staticmethod
    def read(folder: Path) -> Settings:
        """Raises PackageError: a file is damaged, or says what cannot be."""
        genai = _Fields.of(folder / _GENAI)
        generation = _Fields.of(folder / _GENERATION)
        config = _Fields.of(folder / _CONFIG)
        model = genai.section("model")
        decoder = model.section("decoder")
        text = config.section("text_config")
        ends = [file.tokens("eos_token_id") for file in (model, generation, text, config)]
        contexts = [model.count("context_length", "context")]
        for key in _CONTEXT_KEYS:
            contexts += [text.count(key, "context"), config.count(key, "context")]
        head_sizes = [decoder.count("head_size", "head_size"), _read_head_size(text), _read_head_size(config)]
        found = Settings(
            names=_read_names(decoder),
            end=_take_first(ends) or frozenset(),
            context=_take_first(contexts),
            head_size=_take_first(head_sizes),
            layers=decoder.count("num_hidden_layers", "layers"),
        )
        for file in (genai, generation, config):
            file.check()
        return found


class _Fields:
    """A file's values. Each is checked when it is asked for; `check` says what was wrong with all of them."""

    def __init__(self, path: Path, content: Mapping[str, Any], place: str, problems: list[str]) -> None:
        self._path = path
        self._content = content
        self._place = place
        self._problems = problems

    @staticmethod
    def of(path: Path) -> _Fields:
        return _Fields(path, read_object(path), "", [])

    def check(self) -> None:
        if self._problems:
            raise PackageError(
                "says what cannot be; copy the model's own file again", path=self._path, problems=self._problems
            )

    def section(self, name: str) -> _Fields:
        found = self._content.get(name)
        if found is not None and not isinstance(found, dict):
            self.refuse(name, "a JSON object", found)
        content = found if isinstance(found, dict) else {}
        return _Fields(self._path, content, f"{self._place}{name}.", self._problems)

    def count(self, name: str, kind: str) -> int | None:
        """A whole number of at least 1; None where there is none. `kind`: of `MOST`."""
        found = self._content.get(name)
        if found is None:
            return None
        if not _is_whole(found) or not 1 <= found <= MOST[kind]:
            self.refuse(name, f"a whole number from 1 to {MOST[kind]}", found)
            return None
        return int(found)

    def text(self, name: str, usual: str) -> str:
        found = self._content.get(name)
        if found is None:
            return usual
        if not isinstance(found, str) or not found:
            self.refuse(name, "a name", found)
            return usual
        return found

    def tokens(self, name: str) -> frozenset[int] | None:
        """Token ids, one or a list; None where there are none. -1 is how configs say "no token"."""
        found = self._content.get(name)
        if found is None:
            return None
        tokens = found if isinstance(found, list) else [found]
        if not all(_is_whole(token) and -1 <= token < MOST["vocabulary"] for token in tokens):
            self.refuse(name, "a token id or a list of them", found)
            return None
        return frozenset(tokens) - {-1}

    def refuse(self, name: str, rule: str, found: object) -> None:
        self._problems.append(f"{self._place}{name} must be {rule}, and is {_describe_value(found)}")


def read_text(file: Path) -> str | None:
    """None where there is no such file. Raises PackageError: it is no text, or too long."""
    try:
        if not file.exists():
            return None
        if not file.is_file():
            raise PackageError("must be a file, and is none", path=file)
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_LONGEST + 1)
    except (OSError, ValueError) as error:
        raise PackageError(f"cannot be read: {error}; copy it again", path=file) from error
    if len(text) > _LONGEST:
        raise PackageError(f"must not have more than {_LONGEST} characters, and has", path=file)
    return text


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file. Raises PackageError: it is damaged."""
    text = read_text(file)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"must be JSON, and cannot be read: {error}; copy it again", path=file) from error
    if not isinstance(content, dict):
        raise PackageError(f"must hold a JSON object, and holds a {type(content).__name__}", path=file)
    return content


def _take_first(found: Sequence[Any]) -> Any:
    return next((each for each in found if each is not None), None)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe_value(value: object) -> str:
    """A value out of JSON, short enough for a message."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return printable(repr(value), 60, one_line=True)


def _read_head_size(config: _Fields) -> int | None:
    size = config.count("head_dim", "head_size")
    hidden, heads = config.count("hidden_size", "hidden"), config.count("num_attention_heads", "heads")
    if size is None and hidden is not None and heads is not None and heads <= hidden:
        return hidden // heads
    return size


def _read_names(decoder: _Fields) -> Names:
    inputs, outputs = decoder.section("inputs"), decoder.section("outputs")
    usual = Names()
    return Names(
        ids=inputs.text("input_ids", usual.ids),
        mask=inputs.text("attention_mask", usual.mask),
        positions=inputs.text("position_ids", usual.positions),
        past=(
            _read_layered_name(inputs, "past_key_names", usual.past[0]),
            _read_layered_name(inputs, "past_value_names", usual.past[1]),
        ),
        present=(
            _read_layered_name(outputs, "present_key_names", usual.present[0]),
            _read_layered_name(outputs, "present_value_names", usual.present[1]),
        ),
        logits=outputs.text("logits", usual.logits),
    )


def _read_layered_name(names: _Fields, key: str, usual: str) -> str:
    """A name with one place for the layer: without it, every layer would have the same name."""
    name = names.text(key, usual)
    if name.count(_LAYER) != 1:
        names.refuse(key, f"a name with one {_LAYER}, for the layer", name)
    return name
