"""Reads an ONNX file, and refuses one whose tensors are not all there or lie where they must not. It reads protobuf,
and does not know what a graph computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir

from onnx_lora.companions import leads_out
from onnx_lora.errors import ModelError, first_line
from onnx_lora.exporter.foreign_libraries import Failure, attempt, name_step

__all__ = ["read_model", "read_proto"]

# The bits of a number of ONNX's smallest types.
_LEAST_BITS = 2


def read_model(file: Path) -> ir.Model:
    """The model of a file; its external tensors stay where they are. Raises ModelError: see `read_proto`."""
    proto = read_proto(file)
    with name_step("reading it", file):
        model: ir.Model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, file.parent)
    return model


def read_proto(file: Path) -> onnx.ModelProto:
    """What stands in a file, without the tensors that lie beside it.

    Raises ModelError: no such file, no ONNX model, names that are no text, or tensors that are not whole or lie outside
    the file's folder.
    """
    if not file.is_file():
        raise ModelError("there is no such file", path=file)
    try:
        with name_step("reading it", file, must="be an ONNX model"):
            proto = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise ModelError(f"cannot be read: {error}", path=file) from error
    graphs, nodes = _parts(proto)
    if not all(isinstance(name, str) for name in _names(graphs, nodes)):
        raise ModelError("must be valid ONNX, and has names that are no text", path=file)
    _check_tensors(_tensors(graphs, nodes), file)
    return proto


def _parts(proto: onnx.ModelProto) -> tuple[list[onnx.GraphProto], list[onnx.NodeProto]]:
    """All graphs and all nodes of a model, those of branches, loops and functions too."""
    graphs, nodes = [proto.graph], list(proto.graph.node)
    for function in proto.functions:
        nodes.extend(function.node)
    for node in nodes:  # it grows meanwhile
        for attribute in node.attribute:
            inner = list(attribute.graphs)
            if attribute.HasField("g"):
                inner.insert(0, attribute.g)
            graphs.extend(inner)
            for graph in inner:
                nodes.extend(graph.node)
    return graphs, nodes


def _names(graphs: list[onnx.GraphProto], nodes: list[onnx.NodeProto]) -> Iterator[object]:
    """All names in a model. Protobuf hands on as bytes those that are no UTF-8."""
    for graph in graphs:
        for named in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            yield named.name
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _tensors(graphs: list[onnx.GraphProto], nodes: list[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for graph in graphs:
        yield from graph.initializer
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_tensors(tensors: Iterator[onnx.TensorProto], file: Path) -> None:
    """Check that the numbers of every tensor, be it a weight or a node's constant, are there.

    Raises ModelError: numbers are missing, or lie outside of the file's folder.
    """
    problems: dict[str, None] = {}
    places = _Places(file.parent)
    for tensor in tensors:
        if tensor.data_location == tensor.EXTERNAL:
            problem = places.problem(tensor)
        else:
            problem = _inline_problem(tensor)
        if problem is not None:
            problems[problem] = None
    if problems:
        raise ModelError("its tensors must be whole, and lie in its folder", path=file, problems=list(problems))


def _inline_problem(tensor: onnx.TensorProto) -> str | None:
    """What is wrong with a tensor that lies in the file itself."""
    name = str(tensor.name)
    if min(tensor.dims, default=0) < 0:
        return f"{name!r} has an impossible shape: {list(tensor.dims)}"
    # Before anything is allocated for it.
    if prod(tensor.dims) * _LEAST_BITS > 8 * tensor.ByteSize():
        return f"{name!r} must hold {prod(tensor.dims)} numbers, and takes {tensor.ByteSize()} bytes"
    numbers = attempt(lambda: ir.serde.TensorProtoTensor(tensor).numpy())  # a view of the file's bytes, mostly
    if isinstance(numbers, Failure):
        return f"{name!r} is damaged: {numbers.line}"
    return None


@dataclass
class _Places:
    """The data files of a model, each looked up once: why tensors may not lie there, or how long it is."""

    folder: Path
    known: dict[str, str | int] = field(default_factory=dict)

    def problem(self, tensor: onnx.TensorProto) -> str | None:
        """Why a tensor's numbers are not where the file says, or None."""
        name = str(tensor.name)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        offset = entries.get("offset", "")
        length = entries.get("length", "")
        if not all(isinstance(value, str) for value in (location, offset, length)):
            return f"{name!r} does not say in text where it lies"
        if location not in self.known:
            self.known[location] = self._look_up(location)
        found = self.known[location]
        if isinstance(found, str):
            return found
        begin = _natural(offset or "0")
        size = _size(tensor)
        is_other_length = length != "" and _natural(length) != size
        if begin is None or size is None or is_other_length:
            return (
                f"{name!r} must lie at a place of its own size, and says offset {offset[:40]!r}, length {length[:40]!r}"
            )
        if begin + size > found:
            return f"{location} was cut off: weight {name!r} ends past its end"
        return None

    def _look_up(self, location: str) -> str | int:
        """The length of a data file in bytes, or why no tensor may lie there."""
        try:
            path = self.folder / location
            if not location or leads_out(path, self.folder):
                return f"{location!r} must lie in the model's folder"
            return path.stat().st_size if path.is_file() else f"{location} is missing"
        except (OSError, ValueError, RuntimeError) as error:
            return f"{location[:100]!r} cannot be a file of the model: {first_line(error)}"


def _natural(text: str) -> int | None:
    """A number of bytes in decimal digits; None for anything else, and for more digits than a file's length has."""
    if not text.isascii() or not text.isdecimal() or len(text) >= 20:
        return None
    return int(text)


def _size(tensor: onnx.TensorProto) -> int | None:
    """The bytes of a tensor's numbers; None where its type or shape has no such size."""
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError):
        return None
    if min(tensor.dims, default=0) < 0:
        return None
    needed: int = prod(tensor.dims) * bits
    return -(-needed // 8)  # rounded up to whole bytes
