"""The tensors of a PEFT file by what they are: of modules, shared by all modules, whole parameters. It knows no
config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_lora.adapters.formats.builder import AdapterBuilder
from onnx_lora.adapters.formats.peft.keys import Key, Names
from onnx_lora.adapters.methods.method import Method
from onnx_lora.points import Array

__all__ = ["FileTensors", "Parameter", "sort_tensors"]

# A batch norm's count of the batches that it was trained on: PEFT saves it with a head, and evaluation never reads it.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Parameter:
    """A whole parameter. `saved`: of a module of which PEFT trained a copy; `base_layer`: of one that has an
    adapter."""

    value: Array
    saved: bool
    base_layer: bool


@dataclass
class FileTensors:
    """The tensors of a file. `modules`: by module, then by the method's name of the tensor; `shared`: by that name;
    `parameters`: by torch's name of the parameter."""

    modules: dict[str, dict[str, Array]] = field(default_factory=dict)
    shared: dict[str, Array] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)


def sort_tensors(tensors: Mapping[str, Array], method: Method, builder: AdapterBuilder) -> FileTensors:
    """The tensors of a file by their keys. What has no place is a problem of `builder`, or refused there."""
    found = FileTensors()
    names = Names(method.tensors, method.shared)
    adapters = names.adapters(tensors)
    if len(adapters) > 1:
        builder.problems.append(
            f"holds more than one adapter: {', '.join(sorted(adapters))}; save each of them in a folder of its own"
        )
    for key, values in tensors.items():
        _put(key, names.parse(key, adapters), values, found, method, builder)
    if not (found.modules or found.parameters or builder.problems or builder.unsupported):
        builder.problems.append("holds no tensor of an adapter")
    return found


def _put(key: str, parsed: Key, values: Array, found: FileTensors, method: Method, builder: AdapterBuilder) -> None:
    if parsed.kind == "refused":
        builder.unsupported.append(f"{key}: {parsed.name}")
    elif parsed.kind == "module" and parsed.base_layer:
        builder.unsupported.append(f"{key}: of torch's MultiheadAttention, of which no part is applied")
    elif parsed.kind == "base copy":
        builder.notes.append(f"{key}: the base's own copy beside a saved module, which PEFT does not use")
    elif _is_counter(parsed, values):
        builder.notes.append(f"{key}: counts the batches of a training, and changes no answer")
    elif not _has_numbers(parsed, values, method):
        builder.problems.append(f"{key}: must be floating point, and is {values.dtype.name}")
    elif parsed.kind == "parameter":
        known = found.parameters.get(parsed.name)
        if known is not None and not _are_same(known.value, values):
            builder.problems.append(f"{key}: there are two different tensors for {parsed.name}")
        found.parameters[parsed.name] = Parameter(values, parsed.saved, parsed.base_layer)
    else:
        place = found.shared if parsed.kind == "shared" else found.modules.setdefault(parsed.name, {})
        if parsed.tensor in place and not _are_same(place[parsed.tensor], values):
            builder.problems.append(f"{key}: there are two different tensors for {parsed.tensor} of {parsed.name}")
        place[parsed.tensor] = values


def _has_numbers(parsed: Key, values: Array, method: Method) -> bool:
    """Whether its numbers are of a type that the tensor may have."""
    if values.dtype.kind == "f":
        return True
    return parsed.tensor in method.integers and values.dtype.kind in "iu"


def _is_counter(parsed: Key, values: Array) -> bool:
    is_named_so = parsed.kind == "parameter" and parsed.name.rpartition(".")[2] == _COUNTER
    return is_named_so and values.dtype.kind in "iu" and values.size == 1


def _are_same(one: Array, other: Array) -> bool:
    return one is other or np.array_equal(one, other)
