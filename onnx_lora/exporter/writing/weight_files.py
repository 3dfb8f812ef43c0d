"""Puts the weights of graphs into data files of the package: inline tensors are written out once, and external data
files are taken over as they are. It knows tensors and files, and not what the weights are for."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir

from onnx_lora.points import StoredTensor, align_offset

__all__ = ["WeightStore", "where"]

# Smaller initializers stay in the graph: shape inference needs shapes and axes there, and a
# reader gains nothing from a file access for them.
_INLINE_LIMIT = 1024  # bytes


class WeightStore:
    """A package folder's data files. Equal bytes are written once, over all graphs.

    External data is copied as it is, or moved where it lies in `scratch`, which nobody needs later. A data file that
    has one of the names that are `reserved` for files of the package gets another.
    """

    def __init__(self, folder: Path, *, scratch: Path | None = None, reserved: Collection[str] = ()) -> None:
        self._folder = folder
        self._reserved = reserved
        self._scratch = scratch
        self._adopted: dict[Path, str] = {}
        self._written: dict[tuple[str, int], int] = {}  # digest and length -> offset
        self._file: str | None = None
        self._end = 0

    def externalize(self, graph: ir.Graph, always: Collection[str] = ()) -> None:
        """Give every large initializer, and those named in `always`, a place in a file of the folder."""
        inline: list[ir.Value] = []
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                is_ours = Path(tensor.base_dir) == self._folder
                if not is_ours:
                    value.const_value = self._adopt(tensor)
            elif tensor is not None and tensor.dtype != ir.DataType.STRING:
                inline.append(value)
        for value in inline:
            assert value.const_value is not None
            if value.const_value.nbytes >= _INLINE_LIMIT or value.name in always:
                value.const_value = self._write(value.const_value)

    def _adopt(self, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        source = Path(tensor.path)
        if source not in self._adopted:
            name = self._free_name(source.name)
            if self._scratch is not None and source.is_relative_to(self._scratch):
                source.rename(self._folder / name)
            else:
                # Not a hard link: onnx refuses to load a model whose data file has a second one, and
                # that would spoil the original as well as the package.
                shutil.copyfile(source, self._folder / name)
            self._adopted[source] = name
        return self._external(tensor, self._adopted[source], tensor.offset or 0)

    def _write(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        data = tensor.tobytes()
        key = sha256(data).hexdigest(), len(data)
        if self._file is None:
            self._file = self._free_name("model.onnx.data", "inline.onnx.data")
        if key not in self._written:
            self._end = align_offset(self._end, len(data))
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

    def _free_name(self, *names: str) -> str:
        """The first of `names` that no file has taken, else the last with a number before it. Names that differ in
        capital letters alone count as one: some disks do not tell them apart."""
        taken = {name.casefold() for name in self._adopted.values()}
        taken.update(name.casefold() for name in self._reserved)
        if self._file is not None:
            taken.add(self._file.casefold())
        for name in names:
            if name.casefold() not in taken:
                return name
        count = 0
        while f"{count}.{names[-1]}".casefold() in taken:
            count += 1
        return f"{count}.{names[-1]}"


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
