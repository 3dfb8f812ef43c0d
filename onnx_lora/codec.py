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
        if type(data) is not kind:  # not isinstance: True is no number here
            raise ValueError(f"{where} must be {kind.__name__}, not {data!r}")
        return data

    def _decode_variant(self, kind: Any, data: object, where: str) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise ValueError(f"{where} must be an object with a name")
        classes = self.variants[kind]
        if data["name"] not in classes:
            raise UnknownNameError(f"{where} is {data['name']!r}, and known are {', '.join(classes)}")
        return self._decode_fields(classes[data["name"]], data, where)

    def _decode_list(self, kind: Any, data: object, where: str) -> Any:
        if not isinstance(data, list):
            raise ValueError(f"{where} must be a list")
        item = get_args(kind)[0]
        entries = [self.decode(item, entry, f"{where}[{index}]") for index, entry in enumerate(data)]
        return tuple(entries)

    def _decode_dict(self, kind: Any, data: object, where: str) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object")
        item = get_args(kind)[1]
        return {str(key): self.decode(item, entry, f"{where}.{key}") for key, entry in data.items()}

    def _decode_optional(self, kind: Any, data: object, where: str) -> Any:
        present = [each for each in get_args(kind) if each is not types.NoneType]
        if len(present) != 1 or len(get_args(kind)) != 2:
            raise TypeError(f"{where}: a field has one type, or that or None")
        return None if data is None else self.decode(present[0], data, where)

    def _decode_fields(self, kind: type, data: object, where: str) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object")
        values: dict[str, Any] = {}
        missing: list[str] = []
        for name, (field_type, needed) in _fields_of(kind).items():
            if name in data:
                values[name] = self.decode(field_type, data[name], f"{where}.{name}")
            elif needed:
                missing.append(name)
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


def _decode_literal(kind: Any, data: object, where: str) -> str:
    known = get_args(kind)
    if not isinstance(data, str):
        raise ValueError(f"{where} must be one of {', '.join(known)}, not {data!r}")
    if data not in known:
        raise UnknownNameError(f"{where} is {data!r}, and known are {', '.join(known)}")
    return data


@cache
def _fields_of(kind: type) -> dict[str, tuple[Any, bool]]:
    """A dataclass's fields, their types and whether each must be there: looked up once for the thousands of entries of
    a manifest."""
    hints = get_type_hints(kind)
    found: dict[str, tuple[Any, bool]] = {}
    for field in fields(kind):
        needed = field.default is MISSING and field.default_factory is MISSING
        found[field.name] = hints[field.name], needed
    return found
