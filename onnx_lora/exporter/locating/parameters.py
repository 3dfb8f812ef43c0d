"""Which of a model's vectors (norms, biases, a batch norm's statistics) the initializers of a graph are, by the
checkpoint's names. It knows no module, and changes no graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lora.exporter.locating.calls import Calls
from onnx_lora.points import Array

__all__ = ["ParameterNames", "name_built_parameters", "name_parameters"]

# What GenAI's builder calls modules -> what transformers does.
_RENAMED = (
    (re.compile(r"\.layers\.\d+\.final_norm_layernorm\."), ".norm."),
    (re.compile(r"\.attn\."), ".self_attn."),
    (re.compile(r"\.layernorm\."), "."),
)

# What every language model's names begin with, in the text-only class and in the builder's graphs.
_BODY = "model."

# Architectures of which the builder adds 1 to the weights of norms, as their code does when it runs.
_OFFSET = ("gemma",)

_CHANGED = (
    "in this graph its values are not the checkpoint's (the GenAI builder adds 1 to the weights of Gemma's norms), and "
    "an adapter's would not be what is needed; export the checkpoint with via='optimum'"
)


@dataclass(frozen=True, slots=True)
class ParameterNames:
    """What the vectors of a graph are called in the checkpoint, by their initializers' names, where that is another
    name; and why some must not be replaced, by the checkpoint's name."""

    names: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def name_parameters(
    graph: ir.Graph, parameters: Mapping[str, Callable[[], Array]], calls: Calls | None
) -> ParameterNames:
    """Find the checkpoint's vectors among the initializers of a graph: the one whose name means it must have its
    values. `parameters`: read by torch name; `calls`: what torch does with each module, where it was asked."""
    names: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, values in _vectors(graph):
        meant = [name] if name in parameters else _possible(name, parameters, calls)
        equal = [known for known in meant if _is_equal(parameters[known](), values)]
        if len(equal) == 1 and equal[0] != name:
            names[name] = equal[0]
        elif not equal:
            refused |= dict.fromkeys(meant, _CHANGED)
    return ParameterNames(names, refused)


def name_built_parameters(graph: ir.Graph, architecture: str) -> ParameterNames:
    """The same of a graph by GenAI's builder that came without its checkpoint: by names alone."""
    names: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, _ in _vectors(graph):
        theirs = _in_their_words(name)
        if theirs != name:
            names[name] = theirs
        if architecture.startswith(_OFFSET) and "norm." in theirs:
            refused[theirs] = _CHANGED
    return ParameterNames(names, refused)


def _vectors(graph: ir.Graph) -> Iterator[tuple[str, Array]]:
    for name, value in graph.initializers.items():
        if value.const_value is not None and value.shape is not None and value.shape.rank() == 1 and "." in name:
            yield name, value.const_value.numpy()


def _in_their_words(name: str) -> str:
    for pattern, theirs in _RENAMED:
        name = pattern.sub(theirs, name)
    return name


def _possible(name: str, parameters: Mapping[str, object], calls: Calls | None) -> list[str]:
    """The checkpoint's vectors that a builder's name may mean: within a larger model they have more in front."""
    theirs = _in_their_words(name)
    if theirs in parameters:
        return [theirs]
    if not theirs.startswith(_BODY):
        return []
    end = theirs.removeprefix(_BODY)
    found: list[str] = []
    for known in parameters:
        is_called = calls is None or calls.counts.get(known.rpartition(".")[0], 0) == 1
        if known.endswith(f".{end}") and is_called:
            found.append(known)
    return found


def _is_equal(values: Array, other: Array) -> bool:
    """Whether a checkpoint's vector is a graph's, in the graph's type."""
    return bool(np.array_equal(values.astype(other.dtype, copy=False), other, equal_nan=False))
