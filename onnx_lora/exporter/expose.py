"""Which whole weights an adapter may replace: the parameters behind the names a user gives, and how
each lies in the graph. It reads the graph and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.exporter.locate import Linear, unwrap
from onnx_lora.points import FLOAT_TYPES, matches

__all__ = ["HEADS_ONLY", "Exposure", "check_names", "find_exposures", "outputs_behind"]

# The value of `replaceable` that means: the heads of classification models, which PEFT always saves.
HEADS_ONLY = "heads"

# PEFT adds these to modules_to_save for SEQ_CLS, TOKEN_CLS and QUESTION_ANS.
_HEAD_NAMES = ("classifier", "qa_outputs", "score")

# Operators that end a head: what comes behind them has a size of its own.
_WEIGHING = frozenset(["Conv", "Gemm", "LayerNormalization", "MatMul"])


@dataclass(frozen=True, slots=True)
class Exposure:
    """A parameter to be made an input: of a linear node, or any initializer as it is."""

    name: str
    value: ir.Value  # the initializer
    linear: Linear | None  # the node whose weight or bias it is
    is_bias: bool = False


def find_exposures(
    graph: ir.Graph, linears: Sequence[Linear], replaceable: str | Iterable[str]
) -> tuple[tuple[Exposure, ...], frozenset[str]]:
    """The parameters that `replaceable` names (modules, suffixes, or parameters), and the names used."""
    wanted = (
        _HEAD_NAMES if replaceable == HEADS_ONLY else (replaceable,) if isinstance(replaceable, str) else replaceable
    )
    names = tuple(wanted)
    found: dict[str, Exposure] = {}
    for linear in linears:
        if linear.start or linear.out_features != linear.values().shape[1]:
            continue  # packed: its weight is not a whole initializer
        exposures = _of_linear(linear)
        if any(_asked(exposure.name, names) for exposure in exposures):
            found.update((exposure.name, exposure) for exposure in exposures)
    for name, value in _named_initializers(graph).items():
        if name not in found and _asked(name, names):
            found[name] = Exposure(name, value, None)
    used = frozenset(name for name in names for parameter in found if _asked(parameter, (name,)))
    return tuple(found.values()), used


def check_names(replaceable: str | Iterable[str], used: frozenset[str], modules: Sequence[str]) -> None:
    """Raises ModelError: one of the names given means no parameter of any graph."""
    if replaceable == HEADS_ONLY:
        return
    names = {replaceable} if isinstance(replaceable, str) else set(replaceable)
    if missing := sorted(names - used):
        raise ModelError(
            "replaceable must name modules or parameters of the graph, and these are none: " + ", ".join(missing),
            problems=[f"linear modules end with: {', '.join(sorted({name.rpartition('.')[2] for name in modules}))}"],
        )


def outputs_behind(exposure: Exposure) -> tuple[str, ...]:
    """The graph outputs that a head's result reaches without meeting another weight; none for other weights."""
    if exposure.linear is None:
        return ()
    last = exposure.linear.bias[0] if exposure.linear.bias is not None else exposure.linear.node
    reached: dict[str, None] = {}
    seen: set[ir.Node] = set()
    waiting = [last.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            reached[value.name or ""] = None
        for use in value.uses():
            if use.node.op_type in _WEIGHING:
                return ()
            if use.node not in seen:
                seen.add(use.node)
                waiting.extend(use.node.outputs)
    return tuple(reached)


def _of_linear(linear: Linear) -> list[Exposure]:
    exposures = [Exposure(f"{linear.module}.weight", linear.weight, linear)]
    if linear.bias is not None:
        node, position = linear.bias
        bias, _ = unwrap(node.inputs[position])
        if bias is not None:
            exposures.append(Exposure(f"{linear.module}.bias", bias, linear, is_bias=True))
    return exposures


def _asked(parameter: str, names: Sequence[str]) -> bool:
    return parameter in names or matches(parameter.rpartition(".")[0], names)


def _named_initializers(graph: ir.Graph) -> dict[str, ir.Value]:
    """Float initializers by torch name: their own, or that of an Identity that stands for them."""
    named: dict[str, ir.Value] = {}
    for name, value in graph.initializers.items():
        if _is_float(value) and "." in name and "::" not in name:
            named[name] = value
    for node in graph:
        name = node.outputs[0].name or "" if node.op_type == "Identity" else ""
        if "." in name and "/" not in name:
            source, wrappers = unwrap(node.outputs[0])
            if source is not None and _is_float(source) and all(wrapper.op_type == "Identity" for wrapper in wrappers):
                named[name] = node.outputs[0]
    return named


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point() and value.dtype.numpy().name in FLOAT_TYPES
