"""Manifests of older versions in the words of today's. It knows their JSON alone: what is not as it should be stays as
it is, and whoever decodes the result refuses it."""

from __future__ import annotations

from typing import Any

from onnx_lora.kinds import Conv, Linear
from onnx_lora.roles import LinearWeight, Parameter

__all__ = ["OLDEST_VERSION", "upgrade"]

# The oldest version that is still read.
OLDEST_VERSION = 3

# The first version whose kinds and roles are objects.
_OBJECTS = 5

# What version 3 did not ask of graphs that somebody else exported.
_ATTACHED_BEFORE = "it was attached by an onnx-lora that did not look for traces of optimisers"

# What roles are called otherwise today.
_ROLES = {"whole": Parameter.name}


def upgrade(data: dict[str, Any], version: int) -> dict[str, Any]:
    """The JSON of a manifest of `version` as today's; it is changed where it is.

    Raises ValueError: a weight is quantized twice, or has several zero points; a module that is no convolution has a
    kernel or groups; `in_out` is neither true nor false. No version could say that.
    """
    if version >= _OBJECTS:
        return data
    source = data.get("source")
    is_attached = isinstance(source, dict) and source.get("made_by") == "attach"
    doubt = _ATTACHED_BEFORE if version == 3 and is_attached else ""
    for graph in _objects(data, "graphs"):
        for point in _objects(graph, "points"):
            _upgrade_kind(point)
            _upgrade_owner(point, doubt)
        for weight in _objects(graph, "replaceable"):
            _upgrade_role(weight)
            _upgrade_owner(weight, doubt)
    return data


def _objects(owner: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects in a list of `owner`; none where it is no list."""
    entries = owner.get(name)
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def _upgrade_kind(point: dict[str, Any]) -> None:
    """The kind was a name, and a convolution's kernel and groups stood beside it."""
    kind = {"name": point.get("kind", Linear.name)}
    kernel, groups = point.pop("kernel", []), point.pop("groups", 1)
    if kind["name"] == Conv.name:
        kind |= {"kernel": kernel, "groups": groups}
    elif kernel != [] or groups != 1:
        raise ValueError(
            f"a point of kind {kind['name']!r} must have kernel [] and groups 1, not {kernel!r} and {groups!r}"
        )
    point["kind"] = kind


def _upgrade_role(weight: dict[str, Any]) -> None:
    """The role was a name, and whether torch keeps a linear weight `[in, out]` stood beside it."""
    name, in_out = weight.get("role"), weight.pop("in_out", False)
    if not isinstance(name, str):
        return
    role: dict[str, Any] = {"name": _ROLES.get(name, name)}
    if name == LinearWeight.name:
        role["in_out"] = in_out
    elif not isinstance(in_out, bool):
        raise ValueError(f"in_out must be true or false, not {in_out!r}")
    weight["role"] = role


def _upgrade_owner(owner: dict[str, Any], doubt: str) -> None:
    """A part had a list of what is quantized, of one or none, and that a list of zero points."""
    if doubt:
        owner["unproven"] = doubt
    for part in _objects(owner, "parts"):
        quantized = _take_only(part.pop("quantised", []), "quantised")
        if isinstance(quantized, dict):
            quantized["zero_point"] = _take_only(quantized.get("zero_point", []), "zero_point")
        part["quantized"] = quantized


def _take_only(entries: Any, name: str) -> Any:
    """The one entry of a list, or None."""
    if not isinstance(entries, list):
        raise ValueError(f"{name} must be a list")
    if len(entries) > 1:
        raise ValueError(f"{name} must hold one entry or none, and holds {len(entries)}")
    return entries[0] if entries else None
