"""Whole weights that PEFT writes over the base's own, and so over every weight that is tied to it: which modules of a
package those are, and what each of them gets. It knows no format and no method.

A table of embeddings and its output head are mostly tied, and PEFT saves both by itself where tokens were added
(`save_embedding_layers`). Only what the package's graphs compute with counts: an encoder has no head to be tied to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Replacement
from onnx_lora.heads import OFTEN_TIED, TIED_OUTPUT_LAYERS

if TYPE_CHECKING:
    from onnx_lora.manifest import KnownWeight
    from onnx_lora.package import Package
    from onnx_lora.points import InjectionPoint, WholeWeight

__all__ = ["SharedStorage", "spread_to_shared_storage"]

_OTHERWISE = (
    "or save the adapter with both modules in modules_to_save; if they are not tied, "
    '"tie_word_embeddings": false in the package\'s config.json says so'
)


@dataclass(frozen=True)
class SharedStorage:
    """An adapter with a value for every weight that it writes. `problems`: where ties cannot be decided."""

    adapter: Adapter
    problems: tuple[str, ...] = ()


def spread_to_shared_storage(adapter: Adapter, package: Package, config: Mapping[str, Any]) -> SharedStorage:
    """Give the weights that `Replacement.in_place` writes to the modules that are tied to theirs, too. `config`: of the
    package's model."""
    ties = _Ties(package, config.get("tie_word_embeddings"))
    spread = _Spread(adapter.replacements, ties)
    for name, replacement in adapter.replacements.items():
        module, _, parameter = name.rpartition(".")
        may_be_shared = parameter == "weight" and replacement.in_place and replacement.value.ndim > 1
        # A weight that keeps its values leaves those that are tied to it as they are.
        if may_be_shared and not package.has_value(name, replacement.value):
            spread.write(module)
    changed = replace(
        adapter, replacements={**spread.written, **adapter.replacements}, notes=(*adapter.notes, *spread.notes)
    )
    return SharedStorage(changed, tuple(spread.problems))


@dataclass(frozen=True)
class _Spread:
    """The whole weights of an adapter, and the ties of the package that it is for. `written`: the weights that others'
    values are written to, by parameter."""

    replacements: Mapping[str, Replacement]
    ties: _Ties
    written: dict[str, Replacement] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def write(self, module: str) -> None:
        """Write the weight of a module to every module that is tied to it."""
        twins = list(self.ties.candidates(module))
        for twin in twins:
            if self.ties.are_tied(module, twin) is not False:
                self._write_to(twin, module)
        if self.ties.may_be_hidden(module, twins):
            self.problems.append(
                f"{module}.weight: PEFT writes it over every weight tied to it, and the package does not show whether "
                f"one is; merge the adapter with PEFT and export that, {_OTHERWISE}"
            )

    def _write_to(self, twin: str, module: str) -> None:
        """Write the weight of a module to one that is tied to it, or may be."""
        own, other = self.replacements[f"{module}.weight"], self.replacements.get(f"{twin}.weight")
        if other is not None:
            if other.in_place and not np.array_equal(own.value, other.value):
                self.problems.append(
                    f"{module}.weight: {twin} may be tied to it, and the file holds another value for that; merge the "
                    f"adapter with PEFT and export that, {_OTHERWISE}"
                )
            return
        is_tied = self.ties.are_tied(module, twin)
        if is_tied and f"{twin}.weight" in self.ties.package.replaceable:
            self.written[f"{twin}.weight"] = own
            self.notes.append(f"{twin} gets the weight of {module} too: the two are tied")
            return
        which = "is" if is_tied else "may be"
        self.problems.append(
            f"{module}.weight: PEFT writes it over every weight tied to it, {twin} {which} tied to it, and the package "
            f"cannot replace that; export again with `replaceable=` including {twin}, {_OTHERWISE}"
        )


@dataclass(frozen=True)
class _Ties:
    """What a package says of the weights that modules share: by equal digests, by names, and by its config.

    `tied_by_config`: the config's `tie_word_embeddings`; None where it does not say.
    """

    package: Package
    tied_by_config: object

    def candidates(self, module: str) -> Iterator[str]:
        """The other modules of the package that may share the weight of `module`."""
        for other in sorted(self.package.modules - {module}):
            by_name = _is_often_tied(module) and _is_often_tied(other)
            if by_name or self._are_equal(module, other):
                yield other

    def are_tied(self, module: str, other: str) -> bool | None:
        """Whether two candidates share one weight; None where the package does not show it."""
        is_head_of_table = _is_head(module) != _is_head(other)
        if is_head_of_table and self.tied_by_config is False:
            return False
        equal = self._are_equal(module, other)
        if equal is not None:
            return equal
        return True if is_head_of_table and self.tied_by_config is True else None

    def may_be_hidden(self, module: str, twins: Sequence[str]) -> bool:
        """Whether the package may have a module that is tied to `module`, and name it otherwise than those are called.

        twins: the candidates that it names. A head always has a table; a table has a head where the config says so, and
        may have one among the nodes that could not be placed.
        """
        if self.tied_by_config is False or not _is_often_tied(module):
            return False
        if any(_is_head(twin) != _is_head(module) for twin in twins):
            return False
        is_expected = _is_head(module) or (bool(self.tied_by_config) and not self._has_no_output_layer)
        return is_expected or any(graph.unplaced for graph in self.package.manifest.graphs)

    @cached_property
    def _has_no_output_layer(self) -> bool:
        """Whether the package was exported for what needs no layer over the vocabulary."""
        task = self.package.manifest.source.get("task", "")
        return task == "feature-extraction" or task.endswith(("-classification", "question-answering"))

    def _are_equal(self, module: str, other: str) -> bool | None:
        """Whether the base's weights of two modules are equal; None where the package does not show it."""
        one, two = self._owners.get(module), self._owners.get(other)
        if one is None or two is None:
            return None
        if one.sha256 == two.sha256:
            return True
        is_comparable = one.dtype == two.dtype and not (one.is_quantized or two.is_quantized)
        return False if is_comparable else None

    @cached_property
    def _owners(self) -> Mapping[str, InjectionPoint | WholeWeight | KnownWeight]:
        """By module, what of the package has the digest of its weight."""
        owners: dict[str, InjectionPoint | WholeWeight | KnownWeight] = {**self.package.tables, **self.package.points}
        for weight in self.package.replaceable.values():
            if weight.name.endswith(".weight") and len(weight.shape) > 1:
                owners[weight.module] = weight
        return owners


def _is_head(module: str) -> bool:
    return module.rpartition(".")[2] in TIED_OUTPUT_LAYERS


def _is_often_tied(module: str) -> bool:
    return module.rpartition(".")[2] in OFTEN_TIED
