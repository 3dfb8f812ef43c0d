"""An adapter aligned with a package: what its file means there, before anything is checked or laid out.

Files leave open which modules of a package they mean, what else is tied to those, and how many heads a model has.
Here each of these questions is answered once; `bind` and the writers of foreign formats take the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lora.adapters.adapter import Adapter, Change, Delta, MatrixDelta, NeedsConfig
from onnx_lora.adapters.bases import base_number
from onnx_lora.adapters.fused import other_classes_names, with_package_projections
from onnx_lora.adapters.methods.output_scale import OutputScale
from onnx_lora.adapters.module_names import with_package_names
from onnx_lora.adapters.shared_storage import spread_to_shared_storage
from onnx_lora.adapters.tied import spread_to_tied_heads

if TYPE_CHECKING:
    from onnx_lora.package import Package
    from onnx_lora.points import Array

__all__ = ["AlignedAdapter", "align"]

_OTHER_NUMBER = (
    "the number that stands for its base weights is not this package's: it was converted for another base, or other "
    "modules; convert the adapter again for this package, or take the package it belongs to"
)


@dataclass(frozen=True)
class AlignedAdapter:
    """An adapter in the words of one package.

    `adapter` has the package's own names of modules, its changes for every module that they reach, tied heads included,
    those of a packed branch for each of the branch's modules, and those of modules that another class of the model has
    fused, or apart, for the modules of this one. `problems`: what could not be decided; for these
    `bind` refuses the adapter.
    """

    adapter: Adapter
    package: Package
    problems: tuple[str, ...] = ()


def align(adapter: Adapter, package: Package) -> AlignedAdapter:
    """Find out which modules of `package` an adapter changes, and how.

    Raises BindError: a name that may mean several modules of the package, or several names that mean one.
    """
    problems: list[str] = []
    if not _is_of_base(adapter, package):
        problems.append(_OTHER_NUMBER)
    config = package.config
    named = with_package_names(adapter, package, other_classes_names(package, config))
    refitted = with_package_projections(_completed(named, config), package, config)
    stored = spread_to_shared_storage(refitted.adapter, package, config)
    spread = spread_to_tied_heads(stored.adapter, package, config)
    problems.extend([*refitted.problems, *stored.problems, *spread.problems])
    return AlignedAdapter(_without_packed_branches(spread.adapter, package), package, tuple(problems))


def _is_of_base(adapter: Adapter, package: Package) -> bool:
    """Whether the number of an `.onnx_adapter` is this package's; true where it has none."""
    if adapter.base_number is None:
        return True
    # The number was made from names of branches, and these are such names.
    names = [*adapter.deltas, *adapter.changes, *adapter.replacements]
    return adapter.base_number == base_number(names, package.manifest.graphs)


def _completed(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The adapter with its changes completed by the model's config; one that stays incomplete is left as it is."""
    deltas = dict(adapter.deltas)
    changes = dict(adapter.changes)
    for name, change in adapter.changes.items():
        if not isinstance(change, NeedsConfig):
            continue
        completed = change.with_config(config)
        if not isinstance(completed, Delta):
            changes[name] = completed
        elif name not in deltas:
            deltas[name] = completed
            del changes[name]
    return replace(adapter, deltas=deltas, changes=changes)


@dataclass(frozen=True)
class _PackedBranch:
    """Several modules whose outputs one branch computes side by side; `sizes`: the outputs of each."""

    modules: Sequence[str]
    sizes: Sequence[int]

    @property
    def outputs(self) -> int:
        return sum(self.sizes)


def _packed_branches(package: Package) -> dict[str, _PackedBranch]:
    """By the branch's name, which is no module's."""
    packed: dict[str, _PackedBranch] = {}
    for graph in package.manifest.graphs:
        for branch in graph.branches:
            if len(branch.modules) > 1:
                sizes = [package.points[module].out_features for module in branch.modules]
                packed[branch.name] = _PackedBranch(branch.modules, sizes)
    return packed


def _without_packed_branches(adapter: Adapter, package: Package) -> Adapter:
    """The adapter with a change for each module of a packed branch, where an `.onnx_adapter` has one for the branch.

    What does not fit the branch stays under the branch's name, which `bind` refuses.
    """
    packed = _packed_branches(package)
    deltas: dict[str, Delta | MatrixDelta] = {}
    changes: dict[str, Change] = {}
    for name, delta in adapter.deltas.items():
        branch = packed.get(name)
        if branch and isinstance(delta, MatrixDelta) and delta.b.shape == (branch.outputs, delta.rank):
            deltas.update(_delta_by_module(delta, branch))
        else:
            deltas[name] = delta
    for name, change in adapter.changes.items():
        branch = packed.get(name)
        scale = change.output_scale() if branch else None
        if branch and scale is not None and scale.shape == (branch.outputs,):
            changes.update(_scale_by_module(scale, branch))
        else:
            changes[name] = change
    return replace(adapter, deltas=deltas, changes=changes)


def _delta_by_module(delta: MatrixDelta, branch: _PackedBranch) -> Mapping[str, MatrixDelta]:
    """The delta of a packed branch as one for each module: its own outputs of B and of the scale, and the ranks that
    change them. A module that is not changed has none."""
    by_module: dict[str, MatrixDelta] = {}
    end = 0
    for module, size in zip(branch.modules, branch.sizes, strict=True):
        outputs = slice(end, end + size)
        end += size
        b = delta.b[outputs]
        used_ranks = np.flatnonzero(b.any(axis=0))
        scale = None if delta.output_scale is None else delta.output_scale[outputs]
        is_scaled = scale is not None and bool((scale != 1).any())
        if used_ranks.size == 0 and not is_scaled:
            continue
        by_module[module] = replace(delta, a=delta.a[used_ranks], b=b[:, used_ranks], output_scale=scale)
    return by_module


def _scale_by_module(scale: Array, branch: _PackedBranch) -> Mapping[str, OutputScale]:
    """The scale of a packed branch as one for each module. A module whose scale is 1 everywhere has none."""
    ends = np.cumsum(branch.sizes)
    scales = np.split(scale, ends[:-1])
    by_module: dict[str, OutputScale] = {}
    for module, of_module in zip(branch.modules, scales, strict=True):
        if (of_module != 1).any():
            by_module[module] = OutputScale(of_module)
    return by_module
