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

    Raises ModelError: `targets` is no valid expression, or one of it names nothing.
    """
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            excluded = set(heads) | set(others)
            return frozenset(name for name in modules if name not in excluded and name.split(".")[0] not in excluded)
        if targets.lower() == ALL:
            return frozenset(modules)
        try:
            pattern = Expression(targets)
            found = frozenset(name for name in modules if pattern.fullmatch(name))
        except ExpressionError as error:
            raise ModelError(
                f"targets {targets!r} must be a regular expression, a list of names, {ALL_LINEAR!r} or {ALL!r}: {error}"
            ) from error
        if not found:
            raise ModelError(
                f"targets {targets!r} must match whole module names and matches none; there are {_sample(modules)}"
            )
        return found
    words = [word for word in targets if word in (ALL, ALL_LINEAR)]
    groups = [select(modules, word, heads=heads, others=others) for word in words]
    wanted = [target for target in targets if target not in words]
    by_end = _by_end(modules)
    by_name = {target: by_end.get(target, []) for target in wanted}
    missing = [target for target, names in by_name.items() if not names]
    if missing or not (wanted or words):
        problems = [f"{target!r} names no module{_closest(target, modules)}" for target in missing]
        raise ModelError(f"targets must name modules of the graph; there are {_sample(modules)}", problems=problems)
    return frozenset(name for names in (*by_name.values(), *groups) for name in names)


def _by_end(modules: Sequence[str]) -> dict[str, list[str]]:
    """Modules by their names, and by what stands behind each dot of those."""
    found: dict[str, list[str]] = {}
    for name in modules:
        for place in (0, *(dot + 1 for dot, character in enumerate(name) if character == ".")):
            found.setdefault(name[place:], []).append(name)
    return found


def _closest(target: str, modules: Sequence[str]) -> str:
    close = get_close_matches(target, {name.rpartition(".")[2] for name in modules} | set(modules), n=3)
    return f"; close: {', '.join(close)}" if close else ""


def _sample(modules: Sequence[str]) -> str:
    suffixes = sorted({name.rpartition(".")[2] for name in modules})
    return ", ".join(suffixes[:12]) + (f" and {len(suffixes) - 12} more" if len(suffixes) > 12 else "")
