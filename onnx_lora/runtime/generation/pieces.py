"""Text that comes token by token: never half a character, never what may still become a stop string. It knows a
function that decodes tokens, no tokenizer's kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["RunningText", "StopFilter"]

# What decoders write for bytes that are no character, or not yet.
_BROKEN = "�"

# How much of the prompt goes before the first token: enough to say whether a space does. A character has 4 bytes.
_CONTEXT = 8  # tokens

# Tokens without any text (special ones, or none of the tokenizer's) do not make the window longer than this.
_LONGEST = 64  # tokens


class RunningText:
    """Decodes one token after another, as the whole would be decoded behind the prompt.

    Tokens are decoded behind a few earlier ones, because decoders drop the space before a text's first word, and
    because a character may lie in several tokens. Only the window's new end is given out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt[-_CONTEXT:])
        self._whole = len(self._window)  # tokens of the window that end with a whole character
        self._shown = _whole(decode(self._window)) if self._window else ""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = _whole(text)
        new = certain[len(self._shown) :] if certain.startswith(self._shown) else ""
        if len(certain) < len(text) or not certain.startswith(self._shown):
            self._shown += new
            return new
        # Whole: what came before the last whole place is needed no more, unless the rest says nothing by itself.
        rest = self._window[self._whole :]
        alone = self._decode(rest)
        if alone or len(self._window) > _LONGEST:
            self._window, self._shown = rest, alone
        else:
            self._shown = text
        self._whole = len(self._window)
        return new

    def finish(self) -> str:
        """What is left, however broken."""
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            # Bytes that a decoder takes back together with whole characters before them: by themselves.
            text, shown = self._decode(self._window[self._whole :]), ""
        else:
            shown = self._shown
        self._window, self._whole, self._shown = [], 0, ""
        return text[len(shown) :]


def _whole(text: str) -> str:
    return text.rstrip(_BROKEN)


class StopFilter:
    """Passes text on until one of `stops` appears; the earliest ends it, and it and all behind it are cut off."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can no longer become part of a stop string."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        places = [text.find(stop) for stop in self._stops]
        found = [place for place in places if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was kept back: it can become part of a stop string no more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the stop string's first."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
