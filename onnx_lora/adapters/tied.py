"""Trained tokens reach every weight that is tied to their table, as in PEFT; the file names the table alone. It knows
how a package shows a tie, and nothing of formats."""

from __future__ import annotations

from dataclasses import replace

from onnx_lora.adapters.methods.tokens import TokenRows
from onnx_lora.adapters.model import Adapter, Change
from onnx_lora.adapters.model_config import config_of
from onnx_lora.package import Package

__all__ = ["with_tied"]

# What transformers ties to its input embeddings, by the last part of a module's name.
_HEADS = frozenset({"decoder", "embed_out", "lm_head", "output_projection", "vocab_projector"})


def with_tied(adapter: Adapter, package: Package) -> tuple[Adapter, list[str]]:
    """The adapter with its trained tokens in every module that reads them, and why that cannot be said of some."""
    changes: dict[str, Change] = dict(adapter.changes)
    problems: list[str] = []
    for module, change in adapter.changes.items():
        if not isinstance(change, TokenRows):
            continue
        point = package.points.get(module)
        if point is not None:
            changes[module] = change.of_kind(point.kind)
        if point is None or point.kind != "embedding" or config_of(package).get("tie_word_embeddings") is False:
            continue
        for head in _heads(module, package):
            if head in changes:
                continue
            known = package.points.get(head)
            if known is None:
                problems.append(
                    f"{module}: PEFT puts trained tokens into {head} too if it is tied to that, and without a point "
                    f"there nothing tells; export again with --targets including {head.rpartition('.')[2]}"
                )
            elif known.sha256 == point.sha256:
                changes[head] = change.of_kind(known.kind)
    return replace(adapter, changes=changes), problems


def _heads(table: str, package: Package) -> list[str]:
    """Modules that may share the table's weight: output heads, and what is equal to it."""
    digest = package.points[table].sha256
    untargeted = [name for graph in package.manifest.graphs for name in graph.untargeted]
    heads = [name for name in [*package.points, *untargeted] if name.rpartition(".")[2] in _HEADS]
    equal = [name for name, point in package.points.items() if point.sha256 == digest]
    replaceable = [weight.module for weight in package.replaceable.values() if weight.module not in package.points]
    heads += [name for name in replaceable if name.rpartition(".")[2] in _HEADS]
    return [name for name in dict.fromkeys([*equal, *heads]) if name != table]
