"""What a generation gives: a piece for each token, and a result for each row. It knows no graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnx_lora.runtime.generation.cache import Cache

__all__ = ["Generation", "Piece", "Reason"]

# The model's end token; a stop string; `max_tokens`, or the context's end.
Reason = Literal["stop", "stop_string", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to its row's text. `text` is empty while a character or a possible stop string is not
    complete. `reason` says why the row ends with it, or None."""

    row: int
    text: str
    token: int
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What was written behind one prompt. `tokens` end with the token that ended it; `text` has neither end tokens nor
    stop strings. `reason` is None where a stream was left before its end, `cache` where none was to be kept."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    reason: Reason | None
    cache: Cache | None = None
