"""Which modules get a point: PEFT's rules for `target_modules`, over names alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

from onnx_lora.errors import ModelError
from onnx_lora.expressions import Expression, ExpressionError
from onnx_lora.heads import OUTPUT_LAYERS

__all__ = ["ALL", "ALL_LINEAR", "HEADS_ONLY", "select"]

# PEFT's word for every linear module but the output layers.
ALL_LINEAR = "all-linear"

# Ours: every module that can have a point, embeddings, convolutions and output layers too.
ALL = "all"

# The value of `replaceable` that means: the heads of classification models, which PEFT always saves.
HEADS_ONLY = "heads"

# Names in a message.
_SHOWN = 12


def select(
    modules: Sequence[str],
    targets: str | Iterable[str],
    *,
    heads: Iterable[str] = OUTPUT_LAYERS,
    others: Collection[str] = (),
) -> frozenset[str]:
    """The modules that `targets` names, as PEFT's `check_target_module_exists` does.

    `targets`: "all-linear" (every module but the `heads`, and the `others`, which are not linear), "all", a regular
    expression that must match a whole name, or names and suffixes (`q_proj`, `attn.c_attn`), the two words among them.

    Raises ModelError: `targets` is no valid expression, or a name in it is no module's.
    """
    if isinstance(targets, str):
        return _select_by_text(modules, targets, heads=heads, others=others)
    words: list[str] = []
    wanted: list[str] = []
    for target in targets:
        (words if target in (ALL, ALL_LINEAR) else wanted).append(target)
    found: set[str] = set()
    for word in words:
        found |= _select_by_text(modules, word, heads=heads, others=others)
    by_end = _index_by_end(modules)
    problems: list[str] = []
    for target in dict.fromkeys(wanted):
        if target in by_end:
            found.update(by_end[target])
        else:
            problems.append(f"{target!r} names no module{_suggest(target, modules)}")
    if problems or not (wanted or words):
        raise ModelError(f"targets must name modules of the graph; there are {_sample(modules)}", problems=problems)
    return frozenset(found)


def _select_by_text(
    modules: Sequence[str], text: str, *, heads: Iterable[str], others: Collection[str]
) -> frozenset[str]:
    """The modules that one of the two words means, or a regular expression. Raises ModelError: see `select`."""
    if text.lower() == ALL:
        return frozenset(modules)
    if text.lower() == ALL_LINEAR:
        excluded = {*heads, *others}
        return frozenset(name for name in modules if not excluded & {name, name.partition(".")[0]})
    try:
        pattern = Expression(text)
        found = frozenset(name for name in modules if pattern.fullmatch(name))
    except ExpressionError as error:
        raise ModelError(
            f"targets {text!r} must be a regular expression, a list of names, {ALL_LINEAR!r} or {ALL!r}: {error}"
        ) from error
    if not found:
        raise ModelError(
            f"targets {text!r} must match whole module names and matches none; there are {_sample(modules)}"
        )
    return found


def _index_by_end(modules: Sequence[str]) -> dict[str, list[str]]:
    """Modules by their names, and by what stands behind each dot of those."""
    found: dict[str, list[str]] = {}
    for name in modules:
        end = name
        while True:
            found.setdefault(end, []).append(name)
            _, dot, end = end.partition(".")
            if not dot:
                break
    return found


def _suggest(target: str, modules: Sequence[str]) -> str:
    """Names that a misspelt one may mean, for a message."""
    known = set(modules)
    known.update(name.rpartition(".")[2] for name in modules)
    close = get_close_matches(target, known, n=3)
    return f"; close: {', '.join(close)}" if close else ""


def _sample(modules: Sequence[str]) -> str:
    """Some of the names' last parts, for a message."""
    suffixes = sorted({name.rpartition(".")[2] for name in modules})
    shown = ", ".join(suffixes[:_SHOWN])
    return f"{shown} and {len(suffixes) - _SHOWN} more" if len(suffixes) > _SHOWN else shown
