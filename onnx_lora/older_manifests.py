"""Manifests of older versions in the words of today's. It knows their JSON alone: what is not as it should be stays as
it is, and whoever decodes the result refuses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["OLDEST_VERSION", "upgrade"]

# The oldest version that is still read.
OLDEST_VERSION = 3

# The first version whose kinds and roles are objects.
_OBJECTS = 5

# What version 3 did not ask of graphs that somebody else exported.
_ATTACHED_BEFORE = "it was attached by an onnx-lora that did not look for traces of optimisers"

_ROLES = {"whole": "parameter"}


def upgrade(data: Mapping[str, Any], version: int) -> Mapping[str, Any]:
    """The JSON of a manifest of `version` as today's.

    Raises ValueError: a weight is quantized twice, or has several zero points, which no version could say.
    """
    if version >= _OBJECTS:
        return data
    source = data.get("source")
    attached = isinstance(source, dict) and source.get("made_by") == "attach"
    doubt = _ATTACHED_BEFORE if version == 3 and attached else ""

    def point(old: dict[str, Any]) -> dict[str, Any]:
        return _point(old, doubt)

    def weight(old: dict[str, Any]) -> dict[str, Any]:
        return _whole_weight(old, doubt)

    def graph(old: dict[str, Any]) -> dict[str, Any]:
        changed = {"points": _each(old.get("points"), point), "replaceable": _each(old.get("replaceable"), weight)}
        return {**old, **{name: entries for name, entries in changed.items() if name in old}}

    return {**data, "graphs": _each(data.get("graphs"), graph)}


def _each(entries: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Every object of a list changed; anything else as it is."""
    if not isinstance(entries, list):
        return entries
    return [change(entry) if isinstance(entry, dict) else entry for entry in entries]


def _point(old: dict[str, Any], doubt: str) -> dict[str, Any]:
    """The kind, its kernel and its groups stood beside each other."""
    new = {key: value for key, value in old.items() if key not in ("kind", "kernel", "groups")}
    name = old.get("kind", "linear")
    new["kind"] = {"name": name}
    if name == "conv":
        new["kind"] |= {"kernel": old.get("kernel", []), "groups": old.get("groups", 1)}
    return _with_parts(new, doubt)


def _whole_weight(old: dict[str, Any], doubt: str) -> dict[str, Any]:
    """The role was a string, and whether torch keeps a linear weight `[in, out]` stood beside it."""
    new = {key: value for key, value in old.items() if key != "in_out"}
    role = old.get("role")
    if isinstance(role, str):
        new["role"] = {"name": _ROLES.get(role, role)}
        if role == "linear_weight":
            new["role"]["in_out"] = old.get("in_out", False)
    return _with_parts(new, doubt)


def _with_parts(owner: dict[str, Any], doubt: str) -> dict[str, Any]:
    parts = {"parts": _each(owner.get("parts"), _part)} if "parts" in owner else {}
    doubts = {"unproven": doubt} if doubt else {}
    return {**owner, **parts, **doubts}


def _part(old: dict[str, Any]) -> dict[str, Any]:
    """What was quantized had a list of one, and its zero point another."""
    new = {key: value for key, value in old.items() if key != "quantised"}
    quantized = _only(old.get("quantised", []), "quantised")
    if isinstance(quantized, dict):
        quantized = {**quantized, "zero_point": _only(quantized.get("zero_point", []), "zero_point")}
    return {**new, "quantized": quantized}


def _only(entries: Any, name: str) -> Any:
    """The one entry of a list, or None."""
    if not isinstance(entries, list):
        raise ValueError(f"{name} must be a list")
    if len(entries) > 1:
        raise ValueError(f"{name} must hold one entry or none, and holds {len(entries)}")
    return entries[0] if entries else None
