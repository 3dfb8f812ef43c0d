"""An uncompressed `.npz` file as numpy arrays. It trusts nothing in the file, and knows nothing of what its tensors
mean.

`numpy.load` without pickles would make an array before it compares the header with the member's size (64 GiB for a
header that says so). It also takes bytes behind an array, members that are no arrays, structures, texts, dates, and
types that have another size on other machines. So the header is read by numpy's own functions here, and the sizes are
checked before the data is read. A test holds that whatever `numpy.load` refuses is refused here."""

from __future__ import annotations

import math
from typing import IO, Literal

import numpy as np
from numpy.lib import format as npy

from onnx_lora.adapters.formats.files.reading import Reading, TensorFile, name_problems
from onnx_lora.adapters.formats.files.zip_archive import open_archive
from onnx_lora.errors import AdapterFileError
from onnx_lora.points import Array

__all__ = ["read_npz"]

_WIDEST = 8  # bytes of a number: longer ones have other values on other machines


def read_npz(file: Reading) -> TensorFile:
    """Raises AdapterFileError: damaged, compressed, or with arrays that are no plain numbers."""
    with open_archive(file) as archive:
        arrays: dict[str, Array] = {}
        for entry in archive.infolist():
            with archive.open(entry) as stream:
                arrays[entry.filename.removesuffix(".npy")] = _array(stream, entry.file_size)
    problems = name_problems(arrays)
    if problems:
        raise AdapterFileError("is damaged; get it again", path=file.path, problems=problems)
    return TensorFile(arrays, {}, file.sha256())


def _array(stream: IO[bytes], size: int) -> Array:
    """The array of an entry of `size` bytes. Its header says how much memory there must be, and is compared with that
    size before anything is made. Raises ValueError: it is no array of plain numbers, or of another size."""
    version = npy.read_magic(stream)
    if version == (1, 0):
        header = npy.read_array_header_1_0(stream)
    elif version == (2, 0):
        header = npy.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of .npy is not known here")
    shape, by_columns, dtype = header
    are_numbers = dtype.kind in "fiub" and dtype.itemsize <= _WIDEST
    if not are_numbers or any(length < 0 for length in shape):
        raise ValueError(f"an array of {dtype} and shape {shape} is not known here")
    available = size - stream.tell()
    if math.prod(shape) * dtype.itemsize != available:
        raise ValueError(f"an array of {dtype} and shape {shape} does not fit its {available} bytes")
    order: Literal["F", "C"] = "F" if by_columns else "C"
    values: Array = np.frombuffer(stream.read(), dtype).reshape(shape, order=order)
    return values
