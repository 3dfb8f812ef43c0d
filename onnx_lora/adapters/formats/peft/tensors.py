"""The tensors of a PEFT file by what they are: of modules, shared by all modules, whole parameters. It knows no
config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_lora.adapters.formats.builder import AdapterBuilder
from onnx_lora.adapters.formats.peft.keys import Key, Names
from onnx_lora.adapters.methods.method import MERGE, Method
from onnx_lora.adapters.problems import type_problem
from onnx_lora.points import Array

__all__ = ["FileTensors", "Parameter", "sort_tensors"]

# A batch norm's count of the batches that it was trained on: PEFT saves it with a head, and evaluation never reads it.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Parameter:
    """A whole parameter. `is_of_copy`: of a module of which PEFT trained a copy. `is_in_base_layer`: of a module that
    has an adapter too."""

    value: Array
    is_of_copy: bool
    is_in_base_layer: bool


@dataclass
class FileTensors:
    """The tensors of a file. `modules`: by module, then by the method's name of the tensor; `shared`: by that name;
    `parameters`: by torch's name of the parameter."""

    modules: dict[str, dict[str, Array]] = field(default_factory=dict)
    shared: dict[str, Array] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)


def sort_tensors(tensors: Mapping[str, Array], names: Names, builder: AdapterBuilder) -> FileTensors:
    """The tensors of a file by their keys. What has no place is a problem of `builder`, or refused there."""
    found = FileTensors()
    adapters = names.adapters(tensors)
    if len(adapters) > 1:
        builder.problems.append(
            f"holds more than one adapter: {', '.join(sorted(adapters))}; save each of them in a folder of its own"
        )
    sorter = _Sorter(names.method, builder, found)
    for key, values in tensors.items():
        sorter.put(key, names.parse(key, adapters), values)
    holds_something = found.modules or found.parameters
    is_wrong = builder.problems or builder.unsupported
    if not holds_something and not is_wrong:
        builder.problems.append("holds no tensor of an adapter")
    return found


@dataclass(frozen=True)
class _Sorter:
    """Puts the tensors of a file, one by one, where they belong: into `found`, or as words into the builder."""

    method: Method
    builder: AdapterBuilder
    found: FileTensors

    def put(self, key: str, parsed: Key, values: Array) -> None:
        """`key`: the tensor's in the file. `parsed`: what that says."""
        if parsed.kind == "refused":
            self.builder.unsupported.append(f"{key}: {parsed.name}")
        elif parsed.kind == "module" and parsed.is_in_base_layer:
            self.builder.unsupported.append(
                f"{key}: is of torch's MultiheadAttention, no part of which is applied; {MERGE}"
            )
        elif parsed.kind == "base copy":
            self.builder.notes.append(f"{key}: the base's own copy beside a saved module, which PEFT does not use")
        elif _is_counter(parsed, values):
            self.builder.notes.append(f"{key}: counts the batches of a training, and changes no answer")
        elif _may_be_whole_numbers(parsed, values, self.method) or self._is_floating(key, values):
            self._put_numbers(key, parsed, values)

    def _is_floating(self, key: str, values: Array) -> bool:
        """Whether the tensor is floating point; a problem says that it must be."""
        problem = type_problem(key, values)
        if problem is not None:
            self.builder.problems.append(problem)
        return problem is None

    def _put_numbers(self, key: str, parsed: Key, values: Array) -> None:
        if parsed.kind == "parameter":
            known = self.found.parameters.get(parsed.name)
            if known is not None and not _are_same(known.value, values):
                self.builder.problems.append(f"{key}: there are two different tensors for {parsed.name}")
            self.found.parameters[parsed.name] = Parameter(values, parsed.is_of_copy, parsed.is_in_base_layer)
            return
        if parsed.kind == "shared":
            place = self.found.shared
        else:
            place = self.found.modules.setdefault(parsed.name, {})
        if parsed.tensor in place and not _are_same(place[parsed.tensor], values):
            self.builder.problems.append(f"{key}: there are two different tensors for {parsed.tensor} of {parsed.name}")
        place[parsed.tensor] = values


def _may_be_whole_numbers(parsed: Key, values: Array, method: Method) -> bool:
    """Whether the values are whole numbers, and of a tensor that the method lets be."""
    return parsed.tensor in method.integers and values.dtype.kind in "iu"


def _is_counter(parsed: Key, values: Array) -> bool:
    """Whether it is a batch norm's count."""
    if parsed.kind != "parameter" or parsed.name.rpartition(".")[2] != _COUNTER:
        return False
    return values.dtype.kind in "iuf" and values.size == 1


def _are_same(one: Array, other: Array) -> bool:
    return one is other or np.array_equal(one, other)
