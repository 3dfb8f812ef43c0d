"""Damage to the files that a generation reads, the same for the same seed. It knows files, not who reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["damaged"]

# What no program expects, and what one expects elsewhere.
_VALUES: list[Any] = [
    *(None, True, False, [], {}, "", [[]], [None], {"": 0}),
    *(-1, 0, 1, 2, 3, 16, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400, -(10**400)),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
    *("x", "é😀", "\ud800", "\0", "\x1b[31m", "a" * 10_000, "%d", "%d%d", "%s", "{}", "((", "(a+)+$", "▁"),
    *("input_ids", "attention_mask", "position_ids", "logits", "past_key_values.%d.key", "present.%d.value"),
    *("past_key_values.0.key", "BPE", "ByteLevel", "A", "B"),
]

# Pieces of templates, whole and broken.
_PIECES = [
    *("{{", "}}", "{%", "%}", "{#", "#}", "-", "|", "(", ")", "[", "]", "'", '"', "\\", "~", "**", "%", "+", "\n"),
    *("{% for x in messages %}", "{% endfor %}", "{% if x %}", "{% else %}", "{% endif %}", "{% break %}", "{{ x }}"),
    *(
        "{% set ns.x = 1 %}",
        "{% generation %}",
        "{% endgeneration %}",
        "{% macro f() %}",
        "{% endmacro %}",
        "{{ f() }}",
    ),
    *("range(10**9)", "10**9", "'a'*10**9", "|join('b'*9999)", "|center(10**9)", "|tojson", "|batch(10**9)", "|items"),
    *(
        "namespace(x=1)",
        "cycler()",
        "joiner()",
        "lipsum(n=999)",
        "dict(a=1)",
        "raise_exception(x)",
        "strftime_now('%')",
    ),
    *(
        "messages[0]",
        ".__class__",
        "|attr('__init__')",
        "|format(1)",
        "{% include 'x' %}",
        "{% extends x %}",
        "caller()",
    ),
]


def damaged(content: str, seed: int) -> bytes:
    """One to three changes."""
    rng = random.Random(seed)
    try:
        tree = json.loads(content)
    except ValueError:
        return _changed(content, rng, [_piece, _cut, _byte])
    kinds = rng.choices(["values", "text"], [4, 1])
    if kinds == ["text"]:
        return _changed(content, rng, [_cut, _byte])
    for _ in range(rng.randint(1, 3)):
        _damage(tree, rng)
    return json.dumps(tree).encode("utf-8")


def _changed(content: str, rng: random.Random, kinds: list[Callable[[bytes, random.Random], bytes]]) -> bytes:
    data = content.encode("utf-8")
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(kinds)(data, rng)
    return data


def _piece(data: bytes, rng: random.Random) -> bytes:
    place = rng.randint(0, len(data))
    return data[:place] + rng.choice(_PIECES).encode("utf-8") + data[place:]


def _cut(data: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(data))
    return data[:start] + data[start + rng.randint(0, 20) :]


def _byte(data: bytes, rng: random.Random) -> bytes:
    place = rng.randint(0, len(data))
    return data[:place] + rng.randbytes(1) + data[place + 1 :]


def _damage(tree: Any, rng: random.Random) -> None:
    """Change one value of a tree, wherever it lies."""
    places = list(_places(tree))
    if not places:
        return
    holder, key = rng.choice(places)
    other, name = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = rng.choice(_VALUES)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value's holder and key. Of the long tables (a vocabulary) a few are enough."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    for key in keys[:12]:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])
