"""The few edits of a graph that only `onnx` can make, on graphs whose weights stay on disk. It is loaded late:
running a package does not need it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lora.boundary import translate_unread
from onnx_lora.errors import MissingDependencyError, PackageError

__all__ = ["External", "find_externals", "load", "metadata", "place", "resize", "set_metadata"]

# TensorProto.DataLocation
_EXTERNAL = 1


@dataclass(frozen=True, slots=True)
class External:
    """A tensor of a graph whose bytes lie in a file."""

    proto: Any
    file: str
    offset: int  # bytes
    length: int  # bytes

    @property
    def name(self) -> str:
        """The initializer's."""
        return str(self.proto.name)


def load(path: Path) -> Any:
    """The graph's ModelProto without the weights that lie beside it.

    Raises MissingDependencyError: no `onnx`. PackageError: no ONNX graph.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingDependencyError(
            "writing a graph, or giving a head another number of outputs, needs the package onnx; "
            "install it: pip install 'onnx-lora[fold]'"
        ) from error
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise translate_unread(error, path, PackageError, "make the package again") from error
    except DecodeError as error:
        raise PackageError(f"cannot be read: {error}; make the package again", path=path) from error


def metadata(model: Any) -> dict[str, str]:
    """The texts that a graph's file holds beside the graph."""
    return {entry.key: entry.value for entry in model.metadata_props}


def set_metadata(model: Any, key: str, text: str) -> None:
    """Put in such a text, in the place of one of the same key."""
    others = [entry for entry in model.metadata_props if entry.key != key]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    entry = model.metadata_props.add()
    entry.key, entry.value = key, text


def find_externals(model: Any, path: Path) -> list[External]:
    """Every tensor of the graph that lies in a file, subgraphs and functions included."""
    found: list[External] = []
    for tensor in _tensors(model):
        if tensor.data_location != _EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = entries.get("location", "")
        offset = entries.get("offset", "") or "0"
        length = entries.get("length", "")
        is_name = bool(file) and Path(file).name == file
        if not is_name or not offset.isdecimal() or not length.isdecimal():
            raise PackageError(
                f"{tensor.name} must say where in a file of the package it lies, and says {entries}; "
                "make the package again",
                path=path,
            )
        found.append(External(tensor, file, int(offset), int(length)))
    return found


def place(external: External, file: str, offset: int, length: int) -> None:
    """Let a tensor lie elsewhere."""
    tensor = external.proto
    del tensor.external_data[:]
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def resize(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give initializers other shapes, and forget what the graph says of the shapes behind them."""
    if not shapes:
        return
    old_widths = set()
    for tensor in model.graph.initializer:
        if tensor.name in shapes:
            old, new = tuple(tensor.dims), shapes[tensor.name]
            old_widths |= {dim for dim, other in zip(old, new, strict=True) if dim != other}
            tensor.dims[:] = new
    del model.graph.value_info[:]
    for output in model.graph.output:
        for dim in output.type.tensor_type.shape.dim:
            # Any of them may be the head's; one that is not loses a hint and nothing else.
            if dim.HasField("dim_value") and dim.dim_value in old_widths:
                dim.Clear()


def _tensors(model: Any) -> Iterator[Any]:
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _of_graph(attribute.g)
            for graph in attribute.graphs:
                yield from _of_graph(graph)
