"""The public names of a package, loaded when they are first used. It knows no name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module

from onnx_lora.errors import MissingDependencyError
from onnx_lora.extras import how_to_install_for

__all__ = ["lazy_names", "load_object"]


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`; `homes`: the module that defines each public name.

    So that importing a package costs nothing, and what one name needs (ONNX Runtime, torch) need not be installed for
    the others. Using a name raises MissingDependencyError: an optional library that it needs is not installed.
    """

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(homes[name])
        except ModuleNotFoundError as error:
            cure = how_to_install_for(name, error.name or "")
            if cure is None:
                raise
            raise MissingDependencyError(f"onnx_lora.{name} needs {error.name}; install it: {cure}") from error
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names


def load_object(place: str) -> object:
    """What stands at "module:name"; the module is imported at this moment, and no earlier.

    So that a registry names its entries without importing them.
    """
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
