"""Biases of zeros, kept in graphs that torch.export made: its optimiser leaves them out, and an adapter that brings a
bias could not be applied then. A head that no one has trained yet has such a one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["with_zero_biases"]


def with_zero_biases(module: Any, export: Callable[[], Any]) -> Any:
    """What `export` gives, a model of onnx_ir with `module`'s parameters by their names, biases of zeros among them.

    They are other numbers while it is traced, and zeros again in the graph. Where one of them went into another
    constant, the graph is made again with that one left as it is.
    """
    names = _zero_biases(module)
    while True:
        with _changed(module, names):
            model = export()
        initializers = model.graph.initializers
        lost = {name for name in names if name not in initializers}
        if not lost:
            break
        names -= lost
    for name in names:
        _set_to_zero(initializers[name])
    return model


def _zero_biases(module: Any) -> set[str]:
    found: set[str] = set()
    for name, parameter in module.named_parameters():
        is_bias = name.rpartition(".")[2] == "bias" and parameter.ndim == 1
        if is_bias and parameter.is_floating_point() and not parameter.any():
            found.add(name)
    return found


@contextmanager
def _changed(module: Any, names: Collection[str]) -> Iterator[None]:
    """Have biases of other numbers, no two alike, for as long as the block runs."""
    import torch

    parameters = dict(module.named_parameters())
    try:
        for number, name in enumerate(sorted(names), 1):
            values = parameters[name].data
            values.copy_(torch.linspace(0.5, 1.0, values.numel()) * number)
        yield
    finally:
        for name in names:
            parameters[name].data.zero_()


def _set_to_zero(value: Any) -> None:
    import numpy as np
    import onnx_ir as ir

    tensor = value.const_value
    value.const_value = ir.tensor(np.zeros(tensor.shape.numpy(), tensor.dtype.numpy()), name=value.name)
