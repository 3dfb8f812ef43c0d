"""Puts the local functions of a model in the place of their calls, if they are not too many and mean the same version
of every operator set as the graph does. It knows ONNX's operator sets, and no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_lora.errors import ModelError
from onnx_lora.exporter.foreign_libraries import name_step

__all__ = ["inline_functions", "settle_functions"]

# How much work inlining may be. It makes the nodes of a function once for each call, and finds a free name for each by
# counting through the calls: the nodes times the square of the calls. Functions of torch.onnx take thousands; a hundred
# million take ten seconds.
_MOST_WORK = 10**8


def settle_functions(model: ir.Model, file: Path) -> None:
    """Check the functions before anything is made of them, and let them mean the same operators as the graph.

    Raises ModelError: functions call themselves, make more nodes than any model has, or mean other operators than the
    graph does by the same name.
    """
    _check_size(model, file)
    domains: dict[str, None] = {}
    for imports in _imports(model):
        domains.update(dict.fromkeys(imports))
    for domain in domains:
        _agree(model, domain, file)


def inline_functions(model: ir.Model, file: Path) -> None:
    """Put settled functions in the place of their calls. Raises ModelError: a call does not fit its function."""
    with name_step("inlining its functions", file):
        InlinePass()(model)


def _check_size(model: ir.Model, file: Path) -> None:
    """Raises ModelError: a function calls itself, or calls that double with every function make too much of it."""
    called: dict[ir.OperatorIdentifier, Counter[ir.OperatorIdentifier]] = {}
    for key, function in model.functions.items():
        called[key] = _count_calls(model, function.all_nodes())
    try:
        order = [*TopologicalSorter(called).static_order()]
    except CycleError as error:
        names = " -> ".join(str(key[1]) for key in error.args[1])
        raise ModelError(f"its functions must not call themselves, and do: {names}", path=file) from error
    times = _count_calls(model, ir.traversal.RecursiveGraphIterator(model.graph))
    for caller in reversed(order):
        for callee, count in called[caller].items():
            times[callee] += count * times[caller]
    work = 0
    for key, count in times.items():
        nodes = sum(1 for _ in model.functions[key].all_nodes())
        work += nodes * count**2
    if work > _MOST_WORK:
        raise ModelError("its functions call each other so often that no graph can hold it", path=file)


def _count_calls(model: ir.Model, nodes: Iterator[ir.Node]) -> Counter[ir.OperatorIdentifier]:
    """How often nodes call each of the model's functions."""
    calls: Counter[ir.OperatorIdentifier] = Counter()
    for node in nodes:
        key = node.op_identifier()
        if key in model.functions:
            calls[key] += 1
    return calls


def _imports(model: ir.Model) -> list[dict[str, int]]:
    """The versions of operator sets that the graph and each function mean."""
    return [model.opset_imports, *(function.opset_imports for function in model.functions.values())]


def _agree(model: ir.Model, domain: str, file: Path) -> None:
    """Let functions mean the graph's version of an operator set.

    Raises ModelError: an operator that is used differs between the versions.
    """
    meaning = [imports for imports in _imports(model) if domain in imports]
    wanted = meaning[0][domain]  # the graph's, where it has one
    others = sorted({imports[domain] for imports in meaning} - {wanted})
    if not others:
        return
    changed: set[str] = set()
    for name, version in _operators(model, domain):
        if not _is_same(name, version, wanted, domain):
            changed.add(name)
    if changed:
        versions = ", ".join(str(version) for version in others)
        raise ModelError(
            f"its functions must mean the operators of {domain or 'ai.onnx'} {wanted}, as its graph does, and mean "
            f"those of {versions}, where {', '.join(sorted(changed))} are others; export it again with one opset "
            "version for all",
            path=file,
        )
    for imports in meaning:
        imports[domain] = wanted


def _operators(model: ir.Model, domain: str) -> set[tuple[str, int]]:
    """Operators of a domain by name, with the version in which each is used."""
    bodies: list[tuple[Mapping[str, int], Iterator[ir.Node]]] = []
    bodies.append((model.opset_imports, ir.traversal.RecursiveGraphIterator(model.graph)))
    for function in model.functions.values():
        bodies.append((function.opset_imports, function.all_nodes()))
    used: set[tuple[str, int]] = set()
    for imports, nodes in bodies:
        if domain not in imports:
            continue
        for node in nodes:
            if node.domain == domain:
                used.add((node.op_type, imports[domain]))
    return used


def _is_same(name: str, version: int, other: int, domain: str) -> bool:
    """Whether an operator means the same in two versions of its set."""
    if version == other:
        return True
    since = _since(name, version, domain)
    return since > 0 and since == _since(name, other, domain)


def _since(name: str, version: int, domain: str) -> int:
    """The version that an operator came with; 0 where nobody here knows it."""
    try:
        return int(onnx.defs.get_schema(name, version, domain).since_version)
    except (onnx.defs.SchemaError, TypeError, ValueError):
        return 0
