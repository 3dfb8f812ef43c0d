"""Vectors of one number throughout, kept in graphs that torch.export made: biases and norms at their first values. Its
optimiser leaves out biases of zeros, and of equal vectors it keeps one; an adapter could replace none of them then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["with_uniform_vectors"]


def with_uniform_vectors(module: Any, export: Callable[[], Any]) -> Any:
    """What `export` gives, a model of onnx_ir with `module`'s parameters by their names, uniform vectors among them.

    They are other numbers while it is traced, and what they were in the graph. Where one of them went into another
    constant, the graph is made again with that one left as it is.
    """
    numbers = _uniform_vectors(module)
    while True:
        with _changed(module, numbers):
            model = export()
        initializers = model.graph.initializers
        lost = numbers.keys() - initializers.keys()
        if not lost:
            break
        numbers = {name: number for name, number in numbers.items() if name not in lost}
    for name, number in numbers.items():
        _fill(initializers[name], number)
    return model


def _uniform_vectors(module: Any) -> dict[str, float]:
    """By the parameter's name, the number that it holds throughout."""
    found: dict[str, float] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and parameter.numel() and parameter.is_floating_point():
            first = parameter[0]
            if (parameter == first).all():
                found[name] = float(first)
    return found


@contextmanager
def _changed(module: Any, numbers: Mapping[str, float]) -> Iterator[None]:
    """Have vectors of other numbers, no two alike, for as long as the block runs."""
    import torch

    parameters = dict(module.named_parameters())
    try:
        for index, name in enumerate(sorted(numbers), 1):
            values = parameters[name].data
            values.copy_(torch.linspace(0.5, 1.0, values.numel()) * index)
        yield
    finally:
        for name, number in numbers.items():
            parameters[name].data.fill_(number)


def _fill(value: Any, number: float) -> None:
    import numpy as np
    import onnx_ir as ir

    tensor = value.const_value
    value.const_value = ir.tensor(np.full(tensor.shape.numpy(), number, tensor.dtype.numpy()), name=value.name)
