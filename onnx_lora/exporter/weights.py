"""The weights of a package: every tensor that must be external is written once, or linked where it
already lies in a file. It knows tensors and files, not what the weights are for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir

from onnx_lora.errors import ModelError
from onnx_lora.points import StoredTensor

__all__ = ["WeightStore", "where"]

# Smaller initializers stay in the graph: shape inference needs shapes and axes there, and a
# reader gains nothing from a file access for them.
_INLINE_LIMIT = 1024  # bytes

# ONNX Runtime maps large tensors straight from the file, which works on page boundaries.
_PAGE = 4096  # bytes
_LARGE = 2**20  # bytes
_ALIGNMENT = 64  # bytes: a cache line


class WeightStore:
    """A package folder's data files. Equal bytes are written once, over all graphs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._linked: dict[Path, str] = {}
        self._written: dict[tuple[str, int], int] = {}  # digest and length -> offset
        self._file: str | None = None
        self._end = 0

    def externalize(self, graph: ir.Graph, always: Collection[str]) -> None:
        """Give every large initializer, and those named in `always`, a place in a file of the folder.

        Raises ModelError: an external tensor's file is missing, too short, or outside its folder.
        """
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = self._link(tensor)
            elif tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            elif tensor.nbytes >= _INLINE_LIMIT or name in always:
                value.const_value = self._write(tensor)

    def _link(self, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        source = Path(tensor.path)
        try:
            inside = source.resolve().is_relative_to(Path(tensor.base_dir).resolve())
            length = source.stat().st_size
        except OSError as error:
            raise ModelError(f"the file of weight {tensor.name!r} is missing", path=source) from error
        if not inside:
            raise ModelError(f"weight {tensor.name!r} must lie in the model's folder", path=source)
        if (tensor.offset or 0) + tensor.nbytes > length:
            raise ModelError(f"cut off: weight {tensor.name!r} ends past its {length} bytes", path=source)
        if source not in self._linked:
            name = self._free_name(source.name)
            _link_or_copy(source.resolve(), self._folder / name)
            self._linked[source] = name
        return self._external(tensor, self._linked[source], tensor.offset or 0)

    def _write(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        data = tensor.tobytes()
        key = sha256(data).hexdigest(), len(data)
        if self._file is None:
            self._file = self._free_name("model.onnx.data")
        if key not in self._written:
            alignment = _PAGE if len(data) >= _LARGE else _ALIGNMENT
            self._end += -self._end % alignment
            with (self._folder / self._file).open("ab") as file:
                file.truncate(self._end)
                file.write(data)
            self._written[key] = self._end
            self._end += len(data)
        return self._external(tensor, self._file, self._written[key])

    def _external(self, tensor: ir.TensorProtocol, file: str, offset: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            file,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self._folder,
        )

    def _free_name(self, name: str) -> str:
        """`name`, unless a linked file of another folder has taken it."""
        taken = {*self._linked.values(), self._file}
        return next(
            free for free in [name, *(f"{count}.{name}" for count in range(len(taken) + 1))] if free not in taken
        )


def where(value: ir.Value) -> StoredTensor:
    """Where an externalized initializer lies."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return StoredTensor(
        file=str(tensor.location),
        offset=tensor.offset or 0,
        shape=tuple(int(size) for size in tensor.shape.numpy()),
        dtype=tensor.dtype.numpy().name,
    )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
