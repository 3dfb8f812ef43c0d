"""Embeddings in graphs: lookups of rows of a table, plain (Gather) and quantized (GatherBlockQuantized)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from onnx_lora.exporter.graph.product import Operand, Product, Unfit
from onnx_lora.exporter.graph.values import (
    axes_of,
    input_at,
    is_constant,
    numpy_type_of,
    producer_of,
    rows_and_columns,
    shape_of,
    unwrap,
)
from onnx_lora.exporter.graph_kinds.graph_kind import GraphKind
from onnx_lora.exporter.graph_kinds.reading import (
    FLOATS,
    NIBBLES,
    computed_type,
    reads_first,
    turns_matrix,
    unfit_matrix,
    unfit_scheme,
    with_zero_point,
)
from onnx_lora.exporter.surgery.branches import BranchInputs, broadcast, number_own_rows
from onnx_lora.exporter.surgery.surgeon import Surgeon
from onnx_lora.kinds import EMBEDDING, Embedding
from onnx_lora.quantized import Scheme

__all__ = ["EMBEDDING_IN_GRAPHS"]

# The inputs of both operators: the table, and the numbers of the rows.
_TABLE, _NUMBERS = 0, 1


def _read_lookup(node: ir.Node) -> Product | Unfit | None:
    """Gather of rows of a table: an embedding, if the table is one's."""
    table, wrappers = unwrap(input_at(node, _TABLE))
    if table is None or axes_of(table) != 2 or node.attributes.get_int("axis", 0) != 0:
        return None
    if table.dtype is None or table.dtype.name not in FLOATS or input_at(node, _NUMBERS) is None:
        return None
    reason = unfit_matrix(table, wrappers)
    if reason is not None:
        return Unfit(reason, table)
    transposed = turns_matrix(wrappers)  # a head's weight that is looked up too is turned on the way
    rows, columns = rows_and_columns(table)
    return Product(
        node=node,
        reader=node,
        output=node.outputs[0],
        weight=reads_first(node, _TABLE, table, wrappers),
        transposed=transposed,
        inputs=columns if transposed else rows,
        outputs=rows if transposed else columns,
        dtype=computed_type(table, wrappers),
        wrappers=wrappers,
        kind=EMBEDDING,
        source_input=_NUMBERS,
        weight_input=_TABLE,
    )


def _read_blocks(node: ir.Node) -> Product | Unfit | None:
    """GatherBlockQuantized of ONNX Runtime: table, rows, scales, zero points. The table may be a head's weight
    (MatMulNBits) in another shape."""
    table = input_at(node, _TABLE)
    scale = input_at(node, 2)
    zero = input_at(node, 3)
    reshape = producer_of(table, "Reshape")
    weight = table if reshape is None else input_at(reshape, 0)
    if weight is None or not is_constant(weight):
        return None
    if not is_constant(scale) or not (zero is None or is_constant(zero)):
        return Unfit("its scales or zero points are not constant", weight)
    assert scale is not None
    if node.attributes.get_int("gather_axis", 0) != 0 or node.attributes.get_int("quantize_axis", 1) % 2 != 1:
        return Unfit("it is quantized along its entries", weight)
    stored = "" if weight.dtype is None else weight.dtype.name
    if axes_of(scale) != 2 or stored not in ("UINT8", *NIBBLES):
        return Unfit(f"its table is {stored}, not one of UINT8, {', '.join(NIBBLES)}", weight)
    rows, blocks = rows_and_columns(scale)
    size = node.attributes.get_int("block_size", 128)
    if stored in NIBBLES:
        scheme = Scheme("affine", 4, size, 1, rows, shape_of(weight)[-1])
    else:
        scheme = Scheme("blocks", node.attributes.get_int("bits", 4), size, -1, rows, blocks * size)
    reason = unfit_scheme(scheme, weight, scale, zero)
    if reason is not None:
        return Unfit(reason, weight)
    return Product(
        node=node,
        reader=node,
        output=node.outputs[0],
        weight=Operand(node if reshape is None else reshape, 0, weight),
        transposed=False,
        inputs=rows,
        outputs=scheme.columns,
        dtype=numpy_type_of(scale),
        quantized=with_zero_point(scheme, Operand(node, 2, scale), node, 3, zero),
        kind=EMBEDDING,
        source_input=_NUMBERS,
        weight_input=_TABLE,
    )


def _refuse(module: Any, plain: type) -> str | None:
    del plain
    if getattr(module, "max_norm", None) is not None:
        return "with max_norm PEFT renormalises A's rows too"
    return None


class _EmbeddingBranch:
    """Numbers `[batch, ...]` to `[batch, ..., out]`, by rows of A."""

    def build_delta(self, surgeon: Surgeon, given: BranchInputs) -> ir.Value:
        """The pair (row of the batch, number) says which row of A is meant."""
        name, rank = given.name, given.view.rank
        numbers = surgeon.op("Cast", given.view.value, name=f"{name}.numbers", to=ir.DataType.INT64.value)
        shape = surgeon.op("Shape", numbers, name=f"{name}.shape")
        row = number_own_rows(surgeon, shape, given.a, name)
        if rank > 3:
            between = list(range(2, rank - 1))
            row = surgeon.unsqueeze(row, between, name=f"{name}.row_axes")
        row = surgeon.op("Expand", row, shape, name=f"{name}.row_of_each")
        row_column = surgeon.unsqueeze(row, [rank - 1], name=f"{name}.{row.name}")
        number_column = surgeon.unsqueeze(numbers, [rank - 1], name=f"{name}.{numbers.name}")
        places = surgeon.op("Concat", row_column, number_column, name=f"{name}.places", axis=-1)
        low = surgeon.op("GatherND", given.a, places, name=f"{name}.lora_A")
        b = broadcast(surgeon, given.b, rank)
        return surgeon.op("MatMul", low, b, name=f"{name}.lora_B")

    def shape_scale(self, surgeon: Surgeon, scale: ir.Value, product: Product, rank: int, name: str) -> ir.Value:
        del product, name
        return broadcast(surgeon, scale, rank)

    def shape_bias(self, surgeon: Surgeon, bias: ir.Value, product: Product, name: str) -> ir.Value:
        del surgeon, product, name
        return bias


EMBEDDING_IN_GRAPHS = GraphKind(
    kind=Embedding,
    forms={("", "Gather"): _read_lookup, ("com.microsoft", "GatherBlockQuantized"): _read_blocks},
    builder=_EmbeddingBranch(),
    torch_classes=("Embedding",),
    calls="embedding",
    layouts=(True,),
    looks_up=True,
    refuse=_refuse,
)
