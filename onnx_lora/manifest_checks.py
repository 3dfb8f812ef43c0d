"""What of a manifest contradicts itself, or the files beside it. It looks at sizes only: the values of weights are
anybody's. It opens no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lora.kinds import Embedding
from onnx_lora.points import (
    FLOAT_TYPES,
    QUANTIZED_TYPES,
    InjectionPoint,
    Quantization,
    StoredTensor,
    WeightPart,
    WholeWeight,
)

if TYPE_CHECKING:
    from onnx_lora.manifest import GraphInfo

__all__ = ["find_problems"]


def find_problems(graphs: Sequence[GraphInfo], folder: Path) -> list[str]:
    """Everything that is wrong with the graphs of a package in `folder`, in alphabetical order."""
    checks = _Checks()
    for graph in graphs:
        checks.check_graph(graph)
    checks.check_files(folder)
    return sorted(set(checks.problems))


@dataclass
class _Checks:
    """What was found, and how many bytes each file must have for what was seen."""

    problems: list[str] = field(default_factory=list)
    needed: dict[str, int] = field(default_factory=dict)

    def check_graph(self, graph: GraphInfo) -> None:
        self._need(graph.file, 1)
        self._need(graph.base_file, 1)
        for point in graph.points:
            if self._knows_type(point.dtype):
                self._check_parts(point.parts)
                self.problems += _find_point_problems(point)
        for weight in graph.replaceable:
            if self._knows_type(weight.dtype):
                self._check_parts(weight.parts)
                self.problems += _find_weight_problems(weight)
        self.problems += _find_branch_problems(graph)

    def check_files(self, folder: Path) -> None:
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

    def _knows_type(self, dtype: str) -> bool:
        if dtype not in FLOAT_TYPES:
            self.problems.append(f"{dtype} is no type of weights known here; known are {FLOAT_TYPES}")
            return False
        return True

    def _check_parts(self, parts: Sequence[WeightPart]) -> None:
        for part in parts:
            problem = _explain_part(part)
            if problem is not None:
                self.problems.append(f"{part.initializer}: {problem}")
            if part.quantized is None:
                self._check_tensor(part.initializer, part.stored, FLOAT_TYPES)
            else:
                self._check_tensor(part.initializer, part.stored, QUANTIZED_TYPES)
                self._check_quantization(part.quantized)

    def _check_quantization(self, quantized: Quantization) -> None:
        scale = quantized.scale
        self._check_tensor(scale.initializer, scale.stored, FLOAT_TYPES)
        zero_point = quantized.zero_point
        if zero_point is not None:
            self._check_tensor(zero_point.initializer, zero_point.stored, (*QUANTIZED_TYPES, *FLOAT_TYPES))

    def _check_tensor(self, name: str, stored: StoredTensor, types: Sequence[str]) -> None:
        if stored.dtype not in types or stored.offset < 0 or min(stored.shape, default=1) < 0:
            self.problems.append(f"{name}: impossible offset, shape or type")
        else:
            self._need(stored.file, stored.offset + stored.size)


def _explain_part(part: WeightPart) -> str | None:
    """Why a part is none, or None."""
    if part.start < 0 or part.first < 0 or part.outputs < 1:
        return "impossible outputs"
    quantized = part.quantized
    if quantized is None:
        return None
    zeros: tuple[str, tuple[int, ...]] | None = None
    if quantized.zero_point is not None:
        zeros = quantized.zero_point.stored.dtype, quantized.zero_point.stored.shape
    return quantized.scheme.problem(part.stored.shape, quantized.scale.stored.shape, zeros)


def _find_point_problems(point: InjectionPoint) -> list[str]:
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


def _find_weight_problems(weight: WholeWeight) -> list[str]:
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


def _find_branch_problems(graph: GraphInfo) -> list[str]:
    """Where points and branches do not belong together: a point without a branch would take adapters and do
    nothing."""
    problems: list[str] = []
    points = {point.module: point for point in graph.points}
    entered = set[str]()
    for branch in graph.branches:
        if not branch.modules:
            problems.append(f"graph {graph.name}: a branch without modules")
            continue
        entered.update(branch.modules)
        signatures = set()
        for module in branch.modules:
            point = points.get(module)
            signatures.add(None if point is None else (point.kind, point.in_features, point.dtype))
        come_twice = len(set(branch.modules)) < len(branch.modules)
        if len(signatures) > 1 or come_twice:
            problems.append(f"{branch.name}: a branch whose modules differ in inputs or type, or come twice")
    problems += [f"{module}: a point that no branch leads to" for module in points.keys() - entered]
    problems += [f"{module}: a branch leads to this module, and it is no point" for module in entered - points.keys()]
    return problems
