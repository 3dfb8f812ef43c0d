"""What an adapter is before and after it was bound to a package. It knows no file and no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx_lora.package import GraphInfo
from onnx_lora.points import Array

__all__ = ["Adapter", "BoundAdapter", "Coverage", "Delta", "Origin", "Replacement"]


@dataclass(frozen=True)
class Delta:
    """`W = W0 + scale · b · a` in PEFT's orientation: `a` `[r, in]`, `b` `[out, r]`."""

    a: Array
    b: Array
    scale: float


@dataclass(frozen=True)
class Replacement:
    """A whole parameter. `in_graph_layout`: already as the graph input takes it, rows included.

    `in_place`: PEFT writes it over the base's own parameter, and so over every other parameter that
    shares its storage; a module of `modules_to_save` has storage of its own.
    """

    value: Array
    in_graph_layout: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from."""

    path: str
    sha256: str  # of the weight file
    format: str  # "peft", "safetensors" or "onnx_adapter"
    method: str  # "LoRA", "rsLoRA", ...
    base_model: str


@dataclass(frozen=True)
class Adapter:
    """What was trained, tied to no graph: deltas by module, whole weights by torch parameter name.

    `base_digests`: the SHA-256 of the base weights it was bound to, by module or parameter name;
    empty when unknown. `saved_modules`: names of modules whose whole weights it must bring, because
    PEFT cannot load it otherwise. `notes`: what a reader should know and cannot see in the tensors.
    """

    name: str
    deltas: Mapping[str, Delta]
    replacements: Mapping[str, Replacement]
    origin: Origin
    base_digests: Mapping[str, str] = field(default_factory=dict)
    saved_modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """What a bound adapter does to a package, module by module."""

    applied: tuple[str, ...]  # modules
    replaced: tuple[str, ...]  # parameters
    at_base: tuple[str, ...]  # modules with a point that the adapter does not touch
    silent: tuple[str, ...]  # applied, and without effect: every B is zero
    ranks: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter checked against one package, laid out by point and parameter: nothing left to check.

    `M.lora_A.weight` `[1, in, r]`, `M.lora_B.weight` `[1, r, out]` with the scale in it, replaced weights
    as their inputs take them. All C-contiguous and read-only. `base_digests` as in `Adapter`, of
    what the adapter touches. `graphs`: the package's, for `graph_inputs`.
    """

    name: str
    tensors: Mapping[str, Array]
    coverage: Coverage
    origin: Origin
    base_digests: Mapping[str, str]
    graphs: tuple[GraphInfo, ...] = ()

    @property
    def graph_inputs(self) -> dict[str, Array]:
        """What to feed the package's graphs: as `tensors`, the modules of packed projections put together."""
        inputs = [graph.inputs(self.tensors) for graph in self.graphs]
        return {name: value for one in inputs for name, value in one.items()} if inputs else dict(self.tensors)
