"""A decoder's graph: what it takes, what it gives, and which of two families it is of. This is the one place that
tells the families apart; it runs nothing."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lora.errors import PackageError
from onnx_lora.points import Array
from onnx_lora.runtime.generation.settings import Settings
from onnx_lora.runtime.session import AdapterSession

__all__ = ["DecoderGraph", "Part"]

# NodeProto.op_type (field 4, 19 bytes) of the operator whose cache may be one buffer for past and present. Graphs
# with it take their rows' lengths from the attention mask's sums, and number positions from them.
_SHARED_OPERATOR = b"\x22\x13GroupQueryAttention"

_NUMBERS: dict[str, np.dtype[Any]] = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}
_FLOATS: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


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
    def of(session: AdapterSession, settings: Settings) -> DecoderGraph:
        """Raises PackageError: the graph is no decoder with a cache, or takes what nobody here can give it."""
        file = session.package.path / session.graph.file
        names = settings.names
        inputs = {arg.name: arg for arg in session.get_inputs()}
        outputs = {arg.name: arg for arg in session.get_outputs()}
        pairs = _cache_names(names.past, names.present, inputs)
        if missing := [name for name in (names.ids, names.mask) if name not in inputs]:
            raise _no_decoder(file, [f"it has no input {name}" for name in missing])
        if names.logits not in outputs or not pairs:
            problems = [] if names.logits in outputs else [f"it has no output {names.logits}"]
            raise _no_decoder(
                file, problems + ([] if pairs else [f"it has no input {names.past[0].replace('%d', '0')}"])
            )
        known = {names.ids, names.mask, names.positions, *(past for past, _ in pairs)}
        problems = [f"the input {name} is not known here" for name in inputs if name not in known]
        problems += [f"the output {present} is missing" for _, present in pairs if present not in outputs]
        fed = [name for name in (names.ids, names.mask, names.positions) if name in inputs]
        problems += [
            f"{name} must be int64 or int32 [rows, tokens], and is {inputs[name].type} {list(inputs[name].shape)}"
            for name in fed
            if inputs[name].type not in _NUMBERS or len(inputs[name].shape) != 2
        ]
        problems += [f"the input {past} is missing" for past, _ in pairs if past not in inputs]
        caches = [inputs[past] for past, _ in pairs if past in inputs]
        problems += [problem for arg in caches for problem in _cache_problems(arg, settings)]
        logits = outputs[names.logits]
        if logits.type not in _FLOATS or len(logits.shape) != 3:
            problems.append(f"{logits.name} must be floats [rows, tokens, vocabulary], and is {list(logits.shape)}")
        if len({arg.type for arg in caches}) > 1:
            problems.append("the cache must be of one type")
        if problems:
            raise PackageError(
                "no text can be generated with this graph; export it again as a decoder with a plain cache",
                path=file,
                problems=problems,
            )
        last = logits.shape[-1]
        return DecoderGraph(
            ids=names.ids,
            mask=names.mask,
            positions=names.positions if names.positions in inputs else None,
            logits=names.logits,
            numbers={name: _NUMBERS[inputs[name].type] for name in fed},
            parts=tuple(_part(inputs[past], present, settings) for past, present in pairs),
            cache=_FLOATS[inputs[pairs[0][0]].type],
            scores=_FLOATS[logits.type],
            vocabulary=last if isinstance(last, int) else None,
            shared=_holds(file, _SHARED_OPERATOR),
        )

    def zeros(self, part: Part, rows: int, tokens: int) -> Array:
        """An empty cache: zeros, and not what the memory held before."""
        return np.zeros((rows, part.heads, tokens, part.size), self.cache)


def _cache_names(past: tuple[str, str], present: tuple[str, str], inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Past and present of every layer that the graph has."""
    pairs: list[tuple[str, str]] = []
    for layer in map(str, count()):
        names = [(old.replace("%d", layer), new.replace("%d", layer)) for old, new in zip(past, present, strict=True)]
        # A name without a place for the layer would be found for every layer.
        if not any(old in inputs for old, _ in names) or names[0] in pairs:
            break
        pairs += names
    return pairs


def _cache_problems(arg: Any, settings: Settings) -> list[str]:
    shape = list(arg.shape)
    if arg.type not in _FLOATS:
        return [f"{arg.name} must be float32 or float16, and is {arg.type}"]
    if len(shape) != 4 or not isinstance(shape[1], int):
        return [f"{arg.name} must be [rows, heads, tokens, size], and is {shape}"]
    if not isinstance(shape[3], int) and settings.head_size is None:
        return [f"{arg.name} must say its size, and is {shape}; config.json or genai_config.json could say it, too"]
    return []


def _part(arg: Any, present: str, settings: Settings) -> Part:
    size = arg.shape[3] if isinstance(arg.shape[3], int) else settings.head_size
    return Part(arg.name, present, arg.shape[1], int(size or 0))


def _no_decoder(file: Path, problems: list[str]) -> PackageError:
    return PackageError(
        "must be a decoder with a cache for text to be generated (token ids and past in, logits and present out); "
        "export it for the task text-generation-with-past, which is the default for language models",
        path=file,
        problems=problems,
    )


def _holds(file: Path, pattern: bytes) -> bool:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(pattern) >= 0
