"""What the writers of foreign formats share: how a format refuses an adapter, how a scale moves into the factors, and
how tensors get into a file. It knows no format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from onnx_lora.adapters.adapter import Delta, PortableAdapter
from onnx_lora.errors import UnsupportedAdapterError
from onnx_lora.points import Array

__all__ = ["dora_problems", "refuse_writing", "rescale", "save_safetensors"]

# Bytes in which a safetensors file says how long its header is.
_LENGTH = 8


def refuse_writing(adapter: PortableAdapter, format: str, problems: Sequence[str]) -> None:
    """End the writing where the format cannot hold all of the adapter. `format`: as the message calls it.

    Raises UnsupportedAdapterError: there are problems, or the adapter holds nothing.
    """
    is_empty = not adapter.deltas and not adapter.replacements
    if is_empty and not problems:
        problems = ["it holds nothing"]
    if problems:
        raise UnsupportedAdapterError(
            f"{format} cannot hold adapter {adapter.name!r}", path=adapter.origin.path, problems=problems
        )


def dora_problems(deltas: Mapping[str, Delta]) -> list[str]:
    """Why a file with one config for all modules cannot hold the deltas: all of them must have DoRA, or none."""
    with_dora = [module for module, delta in deltas.items() if delta.magnitude is not None]
    without = [module for module, delta in deltas.items() if delta.magnitude is None]
    if not with_dora or not without:
        return []
    return [
        f"{without[0]} (and {len(without) - 1} more): has no DoRA, and {with_dora[0]} has; one config says it for all"
    ]


def rescale(delta: Delta, scale: float) -> Delta:
    """The same change with another scale: B is multiplied by the quotient of the two, and rounded once."""
    if delta.scale == scale:
        return delta
    wide = np.promote_types(delta.b.dtype, np.float32)
    b = (delta.b.astype(np.float64) * (delta.scale / scale)).astype(wide)
    return Delta(delta.a, b, scale, delta.kind, delta.magnitude)


def save_safetensors(file: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write the tensors, in C order, and the metadata: the same ones give the same bytes in every run.

    Raises OSError: the disk refuses it.
    """
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    # The library (0.8) writes metadata in another order each time, and has one order of tensors.
    content = memoryview(safetensors.numpy.save(contiguous))
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    entries = json.loads(bytes(content[_LENGTH:end]))
    header = _make_header({"__metadata__": dict(metadata)} | entries)
    # The bytes are made first, so that only the disk's errors are left when the file is written.
    file.write_bytes(b"".join((header, content[end:])))


def _make_header(entries: Mapping[str, object]) -> bytes:
    """A safetensors header with its length in front; behind it the tensors begin at a multiple of eight bytes."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text
