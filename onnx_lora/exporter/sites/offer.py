"""What one graph of a package offers, at two stages: as it was located, and once all graphs of the package agree."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnx_lora.exporter.graph.axes import Shapes
from onnx_lora.exporter.locating.parameters import ParameterNames
from onnx_lora.exporter.request import GraphFile
from onnx_lora.exporter.sites.site import Sites, WholeWeightSites

__all__ = ["LocatedGraph", "Offer"]


@dataclass(frozen=True, slots=True)
class LocatedGraph:
    """A loaded graph, and the places that it has for branches by itself.

    `doubt`: why whole weights may be others than the model's, or nothing. `parameters`: what its vectors are called.
    """

    source: GraphFile
    model: ir.Model
    shapes: Shapes
    sites: Sites
    doubt: str
    parameters: ParameterNames


@dataclass(frozen=True, slots=True)
class Offer:
    """What a graph can take, once all graphs of the package agree: places for branches, and whole weights."""

    graph: LocatedGraph
    sites: Sites
    whole_weights: WholeWeightSites
