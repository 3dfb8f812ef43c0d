"""Frozen dataclasses as JSON, and back. It knows the types that fields may have, and nothing of what they mean.

A field is an int, a str, a bool, a literal, a dataclass, a tuple of one of them, a dict of them by name, or one of
those or None. Where a field's type is a Protocol with several classes behind it (`variants`), JSON holds the class's
name before its fields. Names beyond the fields are ignored: a later version wrote them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["NEEDED_SINCE", "Codec", "UnknownNameError"]

# In the metadata of a field: the format version before which no reader knows it. Of a field without it a reader may
# ignore what it does not know.
NEEDED_SINCE = "needed_since"


class UnknownNameError(ValueError):
    """The data names something that this version does not know."""


@dataclass(frozen=True)
class Codec:
    """`variants`: the classes behind a Protocol, by the name that JSON gives them."""

    variants: Mapping[Any, Mapping[str, type]]

    def encode(self, value: Any) -> Any:
        """What JSON holds of a value. An optional field without a value is left out."""
        if is_dataclass(value):
            return self._encode_fields(value)
        if isinstance(value, tuple | list):
            return [self.encode(entry) for entry in value]
        if isinstance(value, dict):
            return {key: self.encode(entry) for key, entry in value.items()}
        return value

    def _encode_fields(self, value: Any) -> dict[str, Any]:
        encoded: dict[str, Any] = {}
        for classes in self.variants.values():
            if type(value) in classes.values():
                encoded["name"] = value.name
        for field in fields(value):
            own = getattr(value, field.name)
            if own is not None:
                encoded[field.name] = self.encode(own)
        return encoded

    def decode(self, kind: Any, data: object, where: str) -> Any:
        """JSON data as a value of the type `kind`. `where` names the data in errors.

        Raises ValueError: it is none. UnknownNameError: it names a variant, or a literal, that is not known.
        """
        if kind in self.variants:
            return self._decode_variant(kind, data, where)
        if isinstance(kind, type) and is_dataclass(kind):
            return self._decode_fields(kind, data, where)
        origin = get_origin(kind)
        if origin in (Union, types.UnionType):
            return self._decode_optional(kind, data, where)
        if origin is tuple:
            return self._decode_list(kind, data, where)
        if origin is dict:
            return self._decode_dict(kind, data, where)
        if origin is Literal:
            return _decode_literal(kind, data, where)
        return _decode_plain(kind, data, where)

    def _decode_variant(self, kind: Any, data: object, where: str) -> Any:
        name = data.get("name") if isinstance(data, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"{where} must be an object with a name")
        classes = self.variants[kind]
        if name not in classes:
            raise UnknownNameError(f"{where} is {name!r}, and known are {', '.join(classes)}")
        return self._decode_fields(classes[name], data, where)

    def _decode_list(self, kind: Any, data: object, where: str) -> Any:
        if not isinstance(data, list):
            raise ValueError(f"{where} must be a list")
        item = get_args(kind)[0]
        entries: list[Any] = []
        for index, entry in enumerate(data):
            entries.append(self.decode(item, entry, f"{where}[{index}]"))
        return tuple(entries)

    def _decode_dict(self, kind: Any, data: object, where: str) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object")
        item = get_args(kind)[1]
        entries: dict[str, Any] = {}
        for key, entry in data.items():
            entries[str(key)] = self.decode(item, entry, f"{where}.{key}")
        return entries

    def _decode_optional(self, kind: Any, data: object, where: str) -> Any:
        alternatives = [each for each in get_args(kind) if each is not types.NoneType]
        if len(alternatives) != 1 or len(get_args(kind)) != 2:
            raise TypeError(f"{where}: a field must be of one type, or of one type or None")
        if data is None:
            return None
        return self.decode(alternatives[0], data, where)

    def _decode_fields(self, kind: type, data: object, where: str) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object")
        values: dict[str, Any] = {}
        missing: list[str] = []
        for field in _list_fields(kind):
            if field.name in data:
                values[field.name] = self.decode(field.type, data[field.name], f"{where}.{field.name}")
            elif field.is_needed:
                missing.append(field.name)
        if missing:
            raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
        return kind(**values)

    def needed_since(self, value: Any) -> int:
        """The lowest format version whose readers know everything in a value that they must know; 0: all do."""
        if isinstance(value, tuple | list):
            return max((self.needed_since(entry) for entry in value), default=0)
        if not is_dataclass(value):
            return 0
        newest = 0
        for field in fields(value):
            own = getattr(value, field.name)
            newest = max(newest, self.needed_since(own))
            if own != field.default:
                newest = max(newest, field.metadata.get(NEEDED_SINCE, 0))
        return newest


def _decode_plain(kind: Any, data: object, where: str) -> object:
    """A number, a text, or True or False."""
    if type(data) is not kind:  # not isinstance: True is no number here
        raise ValueError(f"{where} must be {kind.__name__}, not {data!r}")
    return data


def _decode_literal(kind: Any, data: object, where: str) -> str:
    known = get_args(kind)
    if not isinstance(data, str):
        raise ValueError(f"{where} must be one of {', '.join(known)}, not {data!r}")
    if data not in known:
        raise UnknownNameError(f"{where} is {data!r}, and known are {', '.join(known)}")
    return data


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a dataclass; `is_needed`: it has no default, so that JSON must hold it."""

    name: str
    type: Any
    is_needed: bool


@cache
def _list_fields(kind: type) -> tuple[_Field, ...]:
    """A dataclass's fields: looked up once for the thousands of entries of a manifest."""
    hints = get_type_hints(kind)
    found: list[_Field] = []
    for field in fields(kind):
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        found.append(_Field(field.name, hints[field.name], not has_default))
    return tuple(found)
