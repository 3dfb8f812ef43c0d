"""An uncompressed zip archive: what must hold of one before a member is read. It knows nothing of its members."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from onnx_lora.adapters.formats.files.reading import Reading
from onnx_lora.errors import AdapterFileError

__all__ = ["open_archive"]

# Each is some kB of Python's objects. A member for each tensor: as many as the largest adapters have.
_MOST_MEMBERS = 200_000

# What every entry of an archive's directory begins with.
_ENTRY = b"PK\x01\x02"


@contextmanager
def open_archive(file: Reading) -> Iterator[zipfile.ZipFile]:
    """A file as an archive in memory.

    Raises AdapterFileError: compressed or encrypted members, more of them than any adapter has, or such as lie in each
    other. What zipfile raises of damaged bytes is translated where the file is opened.
    """
    data = file.rest()
    if data.count(_ENTRY) > _MOST_MEMBERS:
        raise AdapterFileError(f"must be an archive of at most {_MOST_MEMBERS} members", path=file.path)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
            raise AdapterFileError(
                "must hold arrays that are not compressed or encrypted; save it again", path=file.path
            )
        if sum(member.file_size for member in members) > file.size:
            raise AdapterFileError(
                f"its archive claims to hold more than the file's {file.size} bytes; get it again", path=file.path
            )
        yield archive
