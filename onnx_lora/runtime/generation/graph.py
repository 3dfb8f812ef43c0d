"""A decoder's graph: what it takes, what it gives, and which of two families it is of. This is the one place that
tells the families apart; it runs nothing."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lora.errors import PackageError, RunError
from onnx_lora.points import Array
from onnx_lora.runtime.generation.settings import MOST, Names, Settings

__all__ = ["OF_ENCODER_DECODER", "DecoderGraph", "Part", "make_zeros"]

# NodeProto.op_type (field 4, 19 bytes) of the operator whose cache may be one buffer for past and present. Graphs
# with it take their rows' lengths from the attention mask's sums, and number positions from them.
_SHARED_OPERATOR = b"\x22\x13GroupQueryAttention"

_NUMBERS: dict[str, np.dtype[Any]] = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}
_FLOATS: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}

# What the decoder of an encoder-decoder takes from the encoder, by Optimum's name.
_ENCODED = "encoder_hidden_states"

OF_ENCODER_DECODER = (
    "is of an encoder-decoder, and text is generated here with decoders alone; run its graphs one by one with "
    f"AdapterSession(package, graph=...), what the encoder gives as the decoder's {_ENCODED}"
)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the cache: [rows, heads, tokens, size]."""

    past: str
    present: str
    heads: int
    size: int


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """`shared`: past and present are one buffer, rows are filled without gaps; else the past grows step by step, and
    rows are padded on the left. `numbers`: the types of ids, mask and positions, by input name."""

    ids: str
    mask: str
    positions: str | None
    logits: str
    numbers: Mapping[str, np.dtype[Any]]
    parts: tuple[Part, ...]
    cache: np.dtype[Any]
    scores: np.dtype[Any]
    vocabulary: int | None
    shared: bool

    @staticmethod
    def of(file: Path, settings: Settings, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> DecoderGraph:
        """The decoder in `file`; `inputs` and `outputs`: what a session says of them, by name.

        Raises PackageError: the graph is no decoder with a cache, or takes what nobody here can give it.
        """
        names = settings.names
        pairs = _find_cache(names, inputs)
        _check_kind(file, names, pairs, inputs, outputs)
        fed = [name for name in (names.ids, names.mask, names.positions) if name in inputs]
        problems = [
            *_find_naming_problems(settings, pairs, inputs, outputs),
            *_find_input_problems([inputs[name] for name in fed]),
            *_find_logits_problems(outputs[names.logits]),
        ]
        for past, present in pairs:
            if past in inputs and present in outputs:
                problems += _find_cache_problems(inputs[past], outputs[present], settings)
        cache_types = {inputs[past].type for past, _ in pairs if past in inputs}
        if len(cache_types) > 1:
            problems.append("the cache must be of one type")
        if problems:
            raise PackageError(
                "no text can be generated with this graph; export it again as a decoder with a plain cache",
                path=file,
                problems=problems,
            )
        last = outputs[names.logits].shape[-1]
        return DecoderGraph(
            ids=names.ids,
            mask=names.mask,
            positions=names.positions if names.positions in inputs else None,
            logits=names.logits,
            numbers={name: _NUMBERS[inputs[name].type] for name in fed},
            parts=tuple(_make_part(inputs[past], present, settings) for past, present in pairs),
            cache=_FLOATS[inputs[pairs[0][0]].type],
            scores=_FLOATS[outputs[names.logits].type],
            vocabulary=last if isinstance(last, int) else None,
            shared=_contains(file, _SHARED_OPERATOR),
        )

    def make_empty(self, part: Part, rows: int, tokens: int) -> Array:
        """An empty cache: zeros, and not what the memory held before."""
        return make_zeros((rows, part.heads, tokens, part.size), self.cache)


def make_zeros(shape: Sequence[int], kind: Any) -> Array:
    """An array of zeros. Raises RunError: there is no memory for so many."""
    try:
        return np.zeros(shape, kind)
    except (MemoryError, ValueError, OverflowError) as error:
        raise RunError(
            f"there is no memory for what the call needs; give fewer prompts at once, or smaller max_tokens: {error}"
        ) from error


def _find_cache(names: Names, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of past and present of every layer that the graph has. The loop ends, as no two layers share names."""
    pairs: list[tuple[str, str]] = []
    layer = names.layer(0)
    while any(past in inputs for past, _ in layer):
        pairs += layer
        layer = names.layer(len(pairs) // len(layer))
    return pairs


def _check_kind(
    file: Path,
    names: Names,
    pairs: Sequence[tuple[str, str]],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
) -> None:
    """Raises PackageError: the graph is something else than a decoder."""
    if _ENCODED in inputs:
        raise PackageError(OF_ENCODER_DECODER, path=file, problems=[f"it has the input {_ENCODED}"])
    first, _ = names.layer(0)[0]
    problems = [f"it has no input {name}" for name in (names.ids, names.mask) if name not in inputs]
    if names.logits not in outputs:
        problems.append(f"it has no output {names.logits}")
    if not pairs:
        problems.append(f"it has no input {first}")
    if problems:
        raise PackageError(
            "must be a decoder with a cache for text to be generated (token ids and past in, logits and present out); "
            "export it for the task text-generation-with-past, which is the default for language models",
            path=file,
            problems=problems,
        )


def _find_naming_problems(
    settings: Settings,
    pairs: Sequence[tuple[str, str]],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
) -> list[str]:
    names = settings.names
    taken = Counter([names.ids, names.mask, names.positions, *(past for past, _ in pairs)])
    given = Counter([names.logits, *(present for _, present in pairs)])
    problems = [f"the input {name} is not known here" for name in inputs if name not in taken]
    problems += [f"the input {past} is missing" for past, _ in pairs if past not in inputs]
    problems += [f"the output {present} is missing" for _, present in pairs if present not in outputs]
    for kind, used in (("input", taken), ("output", given)):
        for name, times in used.items():
            if times > 1:
                problems.append(f"the {kind} {name} is named for two purposes in genai_config.json")
    layers = len(pairs) // 2
    if settings.layers not in (None, layers):
        problems.append(f"its cache has {layers} layers, and genai_config.json says {settings.layers}")
    return problems


def _find_input_problems(args: Sequence[Any]) -> list[str]:
    return [
        f"{arg.name} must be int64 or int32 [rows, tokens], and is {arg.type} {list(arg.shape)}"
        for arg in args
        if arg.type not in _NUMBERS or len(arg.shape) != 2
    ]


def _find_logits_problems(logits: Any) -> list[str]:
    shape = list(logits.shape)
    if logits.type not in _FLOATS or len(shape) != 3:
        return [f"{logits.name} must be floats [rows, tokens, vocabulary], and is {logits.type} {shape}"]
    if not _is_open_or_within(shape[2], "vocabulary"):
        return [f"{logits.name} must be of a vocabulary of 1 to {MOST['vocabulary']} tokens, and is {shape}"]
    return []


def _find_cache_problems(past: Any, present: Any, settings: Settings) -> list[str]:
    """Of one tensor: as it goes in, and as it comes out."""
    shape, later = list(past.shape), list(present.shape)
    if past.type not in _FLOATS:
        return [f"{past.name} must be float32 or float16, and is {past.type}"]
    if len(shape) != 4 or not isinstance(shape[1], int) or isinstance(shape[2], int):
        return [f"{past.name} must be [rows, heads, tokens, size] for any number of tokens, and is {shape}"]
    if not isinstance(shape[3], int) and settings.head_size is None:
        return [f"{past.name} must say its size, and is {shape}; config.json or genai_config.json could say it, too"]
    if not _is_open_or_within(shape[1], "heads") or not _is_open_or_within(shape[3], "head_size"):
        return [f"{past.name} must have heads and sizes from 1 to {MOST['heads']} and {MOST['head_size']}: {shape}"]
    # A graph need not say what shape an output has.
    fits = present.type == past.type and len(later) in (0, 4) and all(map(_may_be_equal, shape, later))
    if not fits:
        return [f"{present.name} must be as {past.name} is, {past.type} {shape}: {present.type} {later}"]
    return []


def _is_open_or_within(axis: object, kind: str) -> bool:
    return not isinstance(axis, int) or 1 <= axis <= MOST[kind]


def _may_be_equal(axis: object, other: object) -> bool:
    """Whether an axis of the past and one of the present may have the same length: numbers must be equal, and names say
    nothing (those of the tokens' axis differ)."""
    return not isinstance(axis, int) or not isinstance(other, int) or axis == other


def _make_part(arg: Any, present: str, settings: Settings) -> Part:
    size = arg.shape[3] if isinstance(arg.shape[3], int) else settings.head_size
    return Part(arg.name, present, arg.shape[1], int(size or 0))


def _contains(file: Path, pattern: bytes) -> bool:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(pattern) >= 0
