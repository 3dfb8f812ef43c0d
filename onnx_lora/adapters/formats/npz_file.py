"""An uncompressed `.npz` file as numpy arrays. It trusts nothing in the file, and knows nothing of what its tensors
mean."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from onnx_lora.adapters.formats.files import opened
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["read_npz"]

# All that reading damaged archives and headers was seen to raise.
_DAMAGE = (
    zipfile.BadZipFile,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    MemoryError,
)


def read_npz(path: Path) -> dict[str, Array]:
    """Raises AdapterFileError: no file, damaged, compressed, or with arrays that are no plain numbers."""
    with opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                return _arrays(archive, size, path)
        except _DAMAGE as error:
            raise AdapterFileError(f"must be an .npz file, and is damaged: {error}", path=path) from error


def _arrays(archive: zipfile.ZipFile, size: int, path: Path) -> dict[str, Array]:
    entries = archive.infolist()
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > size:
        raise AdapterFileError("must hold arrays that are not compressed; save it again with savez", path=path)
    arrays = {}
    for entry in entries:
        with archive.open(entry) as stream:
            arrays[entry.filename.removesuffix(".npy")] = _array(stream, entry.file_size)
    return arrays


def _array(stream: IO[bytes], size: int) -> Array:
    """The header says how much memory there must be, and so it is compared with the entry's size before."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of .npy is not known here")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if dtype.hasobject or dtype.kind not in "fiub" or any(length < 0 for length in shape):
        raise ValueError(f"an array of {dtype} and shape {shape} is not known here")
    if math.prod(shape) * dtype.itemsize != size - stream.tell():
        raise ValueError(f"an array of {dtype} and shape {shape} does not fit its {size - stream.tell()} bytes")
    values: Array = np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if by_columns else "C")
    return values
