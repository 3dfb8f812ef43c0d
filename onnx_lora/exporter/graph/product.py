"""A product with a constant weight, as one node of a graph computes it: where the weight lies, and how it is laid out.
This file does not know how such nodes are found, or which module's they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lora.exporter.graph.values import input_at, numbers_of
from onnx_lora.kinds import LINEAR, Kind
from onnx_lora.quantized import Scheme, dequantize, is_rounded

__all__ = ["Operand", "Product", "Quantized", "Unfit"]


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why a node that has a weight is no module's product. `weight`: its initializer, where it is known."""

    reason: str
    weight: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Operand:
    """An initializer, and the node and input position where it is read."""

    node: ir.Node
    position: int
    value: ir.Value


@dataclass(frozen=True, slots=True)
class Quantized:
    """How a weight is quantized, and the initializers beside it."""

    scheme: Scheme
    scale: Operand
    zero_point: Operand | None

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.scale,) if self.zero_point is None else (self.scale, self.zero_point)

    @property
    def scales(self) -> NDArray[Any]:
        return numbers_of(self.scale.value)

    @property
    def zero_points(self) -> NDArray[Any] | None:
        return None if self.zero_point is None else numbers_of(self.zero_point.value)


@dataclass(frozen=True, slots=True)
class Product:
    """`output = source · W0` (and a bias, in some forms); a lookup of rows, or a convolution, by its `kind`.

    `node` multiplies; `reader` takes in the activation, before anything quantizes it; `output` is the product
    as a float. `weight` is the operand that holds W0; `wrappers` lead from it to the node, nearest to the node
    first. `transposed`: W0 is stored `[out, in]`, of a convolution `[out, channels / groups, *kernel]`. `dtype`: what
    the product is computed in. `inputs`, `outputs`: W0's own; of a convolution in groups, those of one.

    Positions of inputs: `source_input` of the reader is the activation, `weight_input` of the node W0, and `bias_input`
    of the node is what it adds to the product, where its operator adds something.
    """

    node: ir.Node
    reader: ir.Node
    output: ir.Value
    weight: Operand
    transposed: bool
    inputs: int
    outputs: int
    dtype: str
    wrappers: tuple[ir.Node, ...] = ()
    quantized: Quantized | None = None
    kind: Kind = LINEAR
    source_input: int = 0
    weight_input: int = 1
    bias_input: int | None = None

    @property
    def source(self) -> ir.Value:
        """The activation, as the graph has it now; of a lookup the rows' numbers."""
        value = self.reader.inputs[self.source_input]
        assert value is not None  # every form checks it
        return value

    @property
    def added(self) -> ir.Value | None:
        """What the node itself adds to the product: its bias."""
        return None if self.bias_input is None else input_at(self.node, self.bias_input)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Every initializer that W0 is made of."""
        return (self.weight,) if self.quantized is None else (self.weight, *self.quantized.operands)

    @property
    def path(self) -> tuple[ir.Node, ...]:
        """The nodes between the weight and `node`."""
        maker = self.weight.node
        if maker is self.node or maker in self.wrappers:
            return self.wrappers
        return (*self.wrappers, maker)

    def is_rounded(self, weight: NDArray[Any]) -> bool:
        """Whether the quantized weight is `weight` `[in, outputs]`, rounded to nearest."""
        assert self.quantized is not None  # of whom else
        stored = weight.T if self.transposed else weight
        return is_rounded(
            self.quantized.scheme,
            stored.astype(np.float32, copy=False),
            numbers_of(self.weight.value),
            self.quantized.scales,
            self.quantized.zero_points,
        )

    def values(self) -> NDArray[Any]:
        """W0 as `[in, outputs]`; of a quantized weight in float32."""
        values = numbers_of(self.weight.value)
        if self.quantized is not None:
            values = dequantize(self.quantized.scheme, values, self.quantized.scales, self.quantized.zero_points)
        matrix = values.reshape(len(values), -1)
        return matrix.T if self.transposed else matrix
