"""A method of another distribution, made so that what it does wrong while it reads names that distribution. It knows no
method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from onnx_lora.adapters.methods.method import Contribution, Method, Module
from onnx_lora.adapters.problems import TensorError
from onnx_lora.boundary import call_foreign
from onnx_lora.errors import PluginError

__all__ = ["guard_method"]

T = TypeVar("T")


def guard_method(method: Method, distribution: str) -> Method:
    """The method, whose functions raise nothing but TensorError, which is about the file, and PluginError."""

    def fault(what: str) -> PluginError:
        return PluginError(f"the method {method.name!r}, brought by {distribution}, {what}; correct or uninstall it")

    def read(module: Module) -> Contribution:
        part = _call(lambda: method.read(module), fault)
        if not isinstance(part, Contribution):
            raise fault(f"must give a Contribution, and gives a {type(part).__name__}")
        return part

    of_parameters = method.of_parameters
    if of_parameters is None:
        return replace(method, read=read)
    read_pairs = of_parameters
    return replace(
        method,
        read=read,
        of_parameters=lambda pairs, rank, scale: _call(lambda: read_pairs(pairs, rank, scale), fault),
    )


def _call(function: Callable[[], T], fault: Callable[[str], PluginError]) -> T:
    """What a function of the other distribution gives. Raises TensorError: it did. PluginError: it raised any other."""

    def attempt() -> T | TensorError:
        try:
            return function()
        except TensorError as error:
            return error

    result = call_foreign(attempt, lambda said: fault(f"must not fail, and does with {said}"))
    if isinstance(result, TensorError):
        raise result
    return result
