"""What PyTorch does with a model's modules in one run, as numbers and names. It runs nothing: `frontends/calls.py` runs
the model and counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Calls"]


@dataclass(frozen=True, slots=True)
class Calls:
    """What torch does with a model's modules in one run: how often it calls each, by name.

    `altered`: those that compute something else than x · W0 (and a bias); `overridden`: those that have a forward of
    their own, altered or not. `shared`: of a module whose weight others of its class have too, all of them.
    """

    counts: Mapping[str, int]
    altered: frozenset[str] = frozenset()
    overridden: frozenset[str] = frozenset()
    shared: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def doubt(self, module: str, nodes: Mapping[str, int]) -> str:
        """Why a graph with so many `nodes` for each module computes something else than the model, or nothing."""
        if module in self.altered:
            return f"{module} computes more than x · W0, and PEFT adds its delta behind all of that"
        for name in sorted(self.shared.get(module, {module})):
            called, found = self.counts.get(name, 0), nodes.get(name, 0)
            if called != found:
                return f"torch calls {name} {called} times, and the graph holds it {found} times"
        return ""
