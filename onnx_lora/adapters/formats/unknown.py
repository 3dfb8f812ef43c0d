"""What to say of a file that is of no format: mostly it is half of an adapter, and the other half lies beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from onnx_lora.errors import AdapterFileError

if TYPE_CHECKING:
    from onnx_lora.adapters.formats.place import Place

__all__ = ["explain_unknown"]

# Files whose other half is a config beside them, by what the names of their tensors hold.
_HALVES = (
    (".lora_a", "is MLX's weights; the scale is in adapter_config.json beside them: give the folder"),
    ("base_model.model.", "is PEFT's weights; the scale is in adapter_config.json beside them: give the folder"),
)


def explain_unknown(place: Place, endings: Iterable[str], refused: Sequence[str] = ()) -> AdapterFileError:
    """Why a file cannot be read, and what to give instead. `endings`: of the files that can. `refused`: what is
    installed and might have read it, and why it was not asked."""
    if place.header is None:
        known = ", ".join(endings)
        return AdapterFileError(
            f"must be a PEFT folder, or a file of a known format ({known}), and is {place.path.resolve().name!r}; "
            "give the folder that holds adapter_config.json",
            path=place.path,
            problems=refused,
        )
    for part, half in _HALVES:
        if any(part in name for name in place.header.names):
            return AdapterFileError(half, path=place.path)
    return AdapterFileError(
        "a single file must be one that onnx-lora wrote, or a tool whose names are known here, and this has none of "
        "their names; a PEFT adapter is a folder with adapter_config.json beside the weights: give that folder",
        path=place.path,
        problems=refused,
    )
