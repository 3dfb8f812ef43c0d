"""What a caller may give as a prompt, as rows of tokens; and how much room a text has. It knows tokenizers and chats by
what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnx_lora.errors import PromptError
from onnx_lora.points import Array
from onnx_lora.runtime.generation.chat import Chat

__all__ = ["Encode", "OnePrompt", "Prompt", "Room", "encode_prompts", "is_batch"]

# Text, a conversation, or token ids.
OnePrompt: TypeAlias = str | Chat | Sequence[int] | Array
Prompt: TypeAlias = OnePrompt | Sequence[OnePrompt]

Encode: TypeAlias = Callable[[str | Chat], list[int]]

# Sequences of numbers, and no token ids.
_BYTES = (bytes, bytearray, memoryview)

_KINDS = "text, a Chat, or a list of token ids"

# Ids that any graph can be fed, int32 or int64, and any tokenizer: where the graph does not say how many it has.
_MOST_IDS = 2**31

# Tokens of a text, or rows of a batch: no context is as long. A `range` can be longer than any memory.
_LONGEST = 2**24


@dataclass(frozen=True, slots=True)
class Room:
    """`context`: tokens that a text may have, `vocabulary`: ids that there are; None where nobody says."""

    context: int | None
    vocabulary: int | None

    def limits(self, lengths: Sequence[int], wanted: int) -> list[int]:
        """How many new tokens each row may get: a text ends at the context's end."""
        if self.context is None:
            return [wanted for _ in lengths]
        return [min(wanted, self.context - length) for length in lengths]

    def problems(self, row: str, past: int, tokens: Sequence[int]) -> list[str]:
        """Why these tokens cannot be fed behind `past` others."""
        length = past + len(tokens)
        if not length:
            return [f"{row}must have a token at least, and has none; give it a text, or a token to start with"]
        if self.context is not None and length >= self.context:
            behind = f" with the {past} before it" if past else ""
            return [f"{row}has {length} tokens{behind}, and the context has room for {self.context}, one of them new"]
        most = self.vocabulary or _MOST_IDS
        wrong = [token for token in tokens if not 0 <= token < most]
        if wrong:
            found = wrong[0] if abs(wrong[0]) < 2**64 else f"a number of {wrong[0].bit_length()} bits"
            return [f"{row}must hold token ids from 0 below {most}, and holds {found}"]
        return []


def is_batch(prompt: Prompt) -> bool:
    """Whether a prompt that `encode_prompts` takes is a list of several, and no single one."""
    if isinstance(prompt, str | Chat):
        return False
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 2
    return not all(_is_id(token) for token in prompt)


def encode_prompts(prompt: Prompt, encode: Encode) -> list[list[int]]:
    """The tokens of every row: one row of a single prompt. Raises PromptError: it is no prompt."""
    if isinstance(prompt, str | Chat):
        return [encode(prompt)]
    if isinstance(prompt, np.ndarray):
        return _read_array(prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, _BYTES):
        raise PromptError(f"a prompt must be {_KINDS}; or a list of these; it is a {type(prompt).__name__}")
    if len(prompt) > _LONGEST:
        raise PromptError(f"a prompt must have {_LONGEST} tokens or rows at most, and has {len(prompt)}")
    if not is_batch(prompt):
        return [_read_ids(prompt, "the prompt")]
    rows: list[list[int]] = []
    for index, each in enumerate(prompt):
        rows.append(encode(each) if isinstance(each, str | Chat) else _read_ids(each, f"prompt {index}"))
    return rows


def _read_array(prompt: Array) -> list[list[int]]:
    if prompt.dtype.kind not in "iu" or prompt.ndim not in (1, 2):
        raise PromptError(
            f"an array of token ids must be of whole numbers and have one axis, or two for a batch; it is "
            f"{prompt.dtype} {list(prompt.shape)}"
        )
    rows: list[list[int]] = np.atleast_2d(prompt).tolist()
    if not rows:
        raise PromptError("a batch must have a prompt at least, and is empty")
    return rows


def _read_ids(tokens: object, what: str) -> list[int]:
    if isinstance(tokens, np.ndarray) and tokens.ndim == 1 and tokens.dtype.kind in "iu":
        return [int(token) for token in tokens]
    if not isinstance(tokens, Sequence) or isinstance(tokens, _BYTES) or len(tokens) > _LONGEST:
        raise PromptError(f"{what} must be {_KINDS}; it is a {type(tokens).__name__}")
    ids: list[int] = []
    for token in tokens:
        if not _is_id(token):
            raise PromptError(f"{what} must be {_KINDS}; it holds a {type(token).__name__}")
        ids.append(int(token))
    return ids


def _is_id(token: object) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)
