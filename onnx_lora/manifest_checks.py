"""What of a manifest contradicts itself, or the files beside it. It looks at sizes only: the values of weights are
anybody's. It opens no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lora.kinds import Embedding
from onnx_lora.points import FLOAT_TYPES, QUANTIZED_TYPES, InjectionPoint, StoredTensor, WeightPart, WholeWeight

if TYPE_CHECKING:
    from onnx_lora.manifest import GraphInfo

__all__ = ["find_problems"]


def find_problems(graphs: Sequence[GraphInfo], folder: Path) -> list[str]:
    """Everything that is wrong with the graphs of a package in `folder`, in alphabetical order."""
    checks = _Checks()
    for graph in graphs:
        checks.graph(graph)
    checks.files(folder)
    return sorted(set(checks.problems))


@dataclass
class _Checks:
    """What was found, and how many bytes each file must have for what was seen."""

    problems: list[str] = field(default_factory=list)
    needed: dict[str, int] = field(default_factory=dict)

    def graph(self, graph: GraphInfo) -> None:
        self._need(graph.file, 1)
        self._need(graph.base_file, 1)
        for point in graph.points:
            if self._type_is_known(point.dtype):
                self._parts(point.parts)
                self.problems += _point_problems(point)
        for weight in graph.replaceable:
            if self._type_is_known(weight.dtype):
                self._parts(weight.parts)
                self.problems += _whole_weight_problems(weight)
        self.problems += _branch_problems(graph)

    def files(self, folder: Path) -> None:
        """That every file is there, and as long as what lies in it."""
        for file, length in self.needed.items():
            if Path(file).name != file:
                self.problems.append(f"{file!r}: files must lie in the package folder itself")
                continue
            try:
                found = (folder / file).stat().st_size
            except (OSError, ValueError):  # ValueError: a name that no file can have
                self.problems.append(f"{file} is missing")
                continue
            if found < length:
                self.problems.append(f"{file} has {found} bytes and must have at least {length}: it was cut off")

    def _need(self, file: str, length: int) -> None:
        self.needed[file] = max(self.needed.get(file, 0), length)

    def _type_is_known(self, dtype: str) -> bool:
        if dtype not in FLOAT_TYPES:
            self.problems.append(f"{dtype} is no type of weights known here; known are {FLOAT_TYPES}")
            return False
        return True

    def _parts(self, parts: Sequence[WeightPart]) -> None:
        for part in parts:
            if (problem := _part_problem(part)) is not None:
                self.problems.append(f"{part.initializer}: {problem}")
            quantized = part.quantized
            self._tensor(part.initializer, part.stored, FLOAT_TYPES if quantized is None else QUANTIZED_TYPES)
            if quantized is None:
                continue
            self._tensor(quantized.scale.initializer, quantized.scale.stored, FLOAT_TYPES)
            zero_point = quantized.zero_point
            if zero_point is not None:
                self._tensor(zero_point.initializer, zero_point.stored, (*QUANTIZED_TYPES, *FLOAT_TYPES))

    def _tensor(self, name: str, stored: StoredTensor, types: Sequence[str]) -> None:
        if stored.dtype not in types or stored.offset < 0 or min(stored.shape, default=1) < 0:
            self.problems.append(f"{name}: impossible offset, shape or type")
        else:
            self._need(stored.file, stored.offset + stored.size)


def _part_problem(part: WeightPart) -> str | None:
    if part.start < 0 or part.first < 0 or part.outputs < 1:
        return "impossible outputs"
    quantized = part.quantized
    if quantized is None:
        return None
    zero_point = quantized.zero_point
    zeros = None if zero_point is None else (zero_point.stored.dtype, zero_point.stored.shape)
    return quantized.scheme.problem(part.stored.shape, quantized.scale.stored.shape, zeros)


def _point_problems(point: InjectionPoint) -> list[str]:
    """Where the kind has no such sizes, or the parts of a point are not its whole weight."""
    problem = point.kind.problem(point.in_features, point.out_features)
    if problem is not None:
        return [f"{point.module}: {problem}"]
    problems: list[str] = []
    for part in point.parts:
        inputs, outputs = part.matrix
        if inputs != point.weight_inputs or part.start + part.outputs > outputs:
            problems.append(f"{part.initializer}: does not hold {point.module}'s weight")
        # MatMulNBits keeps blocks along the inputs, a table along its features.
        in_blocks = part.quantized is not None and part.quantized.scheme.layout == "blocks"
        if in_blocks and part.transposed == isinstance(point.kind, Embedding):
            problems.append(f"{part.initializer}: its blocks lie along the wrong axis")
    if not _is_covered(point):
        problems.append(f"{point.module}: its parts are not its whole weight")
    return problems


def _is_covered(point: InjectionPoint) -> bool:
    """Whether the parts hold every output of the module, none twice but by copies of a whole part."""
    pieces = {(part.first, part.outputs) for part in point.parts}
    end = 0
    for first, outputs in sorted(pieces):
        if first != end:
            return False
        end = first + outputs
    return end == point.out_features


def _whole_weight_problems(weight: WholeWeight) -> list[str]:
    """Where a whole weight has not the shape of its role, or lies nowhere."""
    if min(weight.shape, default=1) < 0:
        return [f"{weight.name}: impossible shape"]
    if not weight.parts:
        return [f"{weight.name}: lies nowhere"]
    problem = weight.role.problem(weight.shape)
    if problem is None and weight.free_outputs and weight.role.free_axis is None:
        problem = "has no axis whose length is free"
    if problem is not None:
        return [f"{weight.name}: {problem}"]
    problems: list[str] = []
    for part in weight.parts:
        expected = weight.role.initializer_shape(weight.shape, transposed=part.transposed)
        if part.stored.shape != expected or part.quantized is not None:
            problems.append(f"{part.initializer}: does not hold {weight.name}")
    return problems


def _branch_problems(graph: GraphInfo) -> list[str]:
    """A point without a branch would take adapters and do nothing."""
    problems: list[str] = []
    known = {point.module: (point.kind, point.in_features, point.dtype) for point in graph.points}
    entered = set[str]()
    for branch in graph.branches:
        if not branch.modules:
            problems.append(f"graph {graph.name}: a branch without modules")
            continue
        entered.update(branch.modules)
        is_one_kind = len({known.get(module) for module in branch.modules}) == 1
        if not is_one_kind or len(set(branch.modules)) < len(branch.modules):
            problems.append(f"{branch.name}: a branch whose modules differ in inputs or type, or come twice")
    problems += [f"{module}: a point that no branch leads to" for module in known.keys() - entered]
    problems += [f"{module}: a branch to what is no point" for module in entered - known.keys()]
    return problems
