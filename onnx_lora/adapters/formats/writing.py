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

# Bytes of the header's length, which the header itself is a multiple of.
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
    """Write the tensors, in C order, and the metadata: the same bytes every time. Raises OSError: the disk refuses."""
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    # The bytes are made first, so that only the disk's errors are left when the file is written.
    content = safetensors.numpy.save(contiguous, dict(metadata))
    file.write_bytes(_in_order(content))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in the order of a hash that is random."""
    length = int.from_bytes(content[:_LENGTH], "little")
    header = json.loads(content[_LENGTH : _LENGTH + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    padded = text.ljust(-len(text) % _LENGTH + len(text))  # with spaces, as the format has it
    return len(padded).to_bytes(_LENGTH, "little") + padded + content[_LENGTH + length :]
