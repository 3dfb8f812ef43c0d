"""One mutation engine: bytes of a file in, damaged bytes out. It knows containers (JSON, safetensors, zip, pickle, npz,
protobuf); it knows nothing of adapters or graphs.

Half of the changes are blind (bytes, cuts, splices, length fields); the others take the file apart, change a part, and
put it together again, so that the change gets past the first check."""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

__all__ = ["mutate"]

# A mutation takes the bytes, and the chance that decides.
Mutation = Callable[[bytes, Random], bytes]

# Where headers are. Blind changes fall here more often than behind.
_HEADER = 900  # bytes

# How much longer than its original a mutant may be: an input of a gigabyte shows nothing about a reader.
_GROWTH = 2**18  # bytes

# Nested deeper than Python's recursion and onnx's, and not.
_DEPTHS = (5, 60, 200, 1200, 20_000)

_NUMBERS = (0, 1, -1, 2, 3, 7, 64, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62)
_EXTREMES = (2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**30)
_REALS = (0.0, -0.0, 1e-320, 1e38, 1e308, -1.5, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "",
    ".",
    "..",
    "../../outside",
    "/etc/hostname",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "name\nnext",
    "%s%n",
    "{0.__class__}",
    "x" * 300,
    "é" * 200,
    "(a+)+$",
    "(.*)*(.*)*x",
    "[",
    "\\",
    "(?P<n>",
    "a{1,60000}",
    ".*",
    "layers.0.q_proj",
    "base_model.model.",
    "lora_A",
    "weight",
    "1",
    "nan",
    "{% for a in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**9 }}",
    *("input_ids", "attention_mask", "position_ids", "logits", "past_key_values.%d.key", "present.%d.value"),
    *("past_key_values.0.key", "%d", "%d%d", "BPE", "ByteLevel", "▁", "é😀"),
    *("{{", "}}", "{%", "%}", "{#", "#}", "{% endfor %}", "{% else %}", "{% break %}", "{% macro f() %}", "{{ f() }}"),
    *("{% set ns.x = 1 %}", "{% generation %}", "{% include 'x' %}", "{% extends x %}", "namespace(x=1)", "cycler()"),
    *("range(10**9)", "|join('b'*9999)", "|center(10**9)", "|tojson", "|batch(10**9)", "lipsum(n=999)", "caller()"),
    *("raise_exception(x)", "strftime_now('%')", "messages[0]", ".__class__", "|attr('__init__')", "|format(1)"),
)


def mutate(data: bytes, name: str, chance: Random, others: Sequence[bytes] = ()) -> bytes:
    """`data`, the content of a file called `name`, changed in one to three places. `others`: files to splice from."""
    aware = _aware(name, data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if aware and chance.random() < 0.6:
            with contextlib.suppress(Exception):  # damaged too much already to be taken apart
                data = chance.choice(aware)(data, chance)
                continue
        if others and chance.random() < 0.06:
            data = _splice(data, chance.choice(list(others)), chance)
        else:
            data = chance.choice(_BLIND)(data, chance)
    return data


class _NothingThere(Exception):  # noqa: N818 - no error
    """These bytes have nothing that a mutation could change."""


def _aware(name: str, data: bytes) -> tuple[Mutation, ...]:
    """The mutations that know what is in such a file."""
    if name.endswith(".json"):
        return (_json, _json, _digits)
    if name.endswith(".onnx"):
        return (_protobuf,)
    if name.endswith(".safetensors"):
        return (_safetensors,)
    if data[:2] == b"PK":
        return (_zip,)
    if name.endswith((".bin", ".pt", ".pkl")):
        return (_pickle,)
    if name.endswith((".jinja", ".txt")):
        return (_digits, _words)
    return ()


# --- blind ---------------------------------------------------------------------------------------


def _place(data: bytes, chance: Random) -> int:
    end = len(data) if chance.random() < 0.3 else min(len(data), _HEADER)
    return chance.randrange(max(end, 1))


def _byte(data: bytes, chance: Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]


def _bit(data: bytes, chance: Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + bytes(byte ^ 1 << chance.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _cut(data: bytes, chance: Random) -> bytes:
    return data[: _place(data, chance)]


def _remove(data: bytes, chance: Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + data[at + chance.randint(1, 16) :]


def _insert(data: bytes, chance: Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + chance.randbytes(chance.randint(1, 16)) + data[at:]


def _repeat(data: bytes, chance: Random) -> bytes:
    at = _place(data, chance)
    piece = data[at : at + chance.randint(1, 64)]
    times = 1 if chance.random() < 0.8 else chance.choice((10, 200))
    return data[:at] + piece * times + data[at:]


def _length(data: bytes, chance: Random) -> bytes:
    """A number of 1 to 8 bytes overwritten, where a small one stood: lengths, counts, offsets, shapes."""
    size, order = chance.choice((1, 2, 4, 8)), chance.choice(("little", "little", "big"))
    at = _place(data, chance)
    if size > 1 and chance.random() < 0.7:
        zeros = [found.start() for found in re.finditer(b"[^\0]\0{%d}" % (size - 1), data[:_HEADER])]
        at = chance.choice(zeros or [at])
    old = int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]
    new = chance.choice((old + 1, old - 1, old * 2, old + 8, chance.choice(_NUMBERS), chance.choice(_EXTREMES)))
    return data[:at] + (new % 256**size).to_bytes(size, order) + data[at + size :]  # type: ignore[arg-type]


def _splice(data: bytes, other: bytes, chance: Random) -> bytes:
    start = _place(other, chance)
    at = _place(data, chance)
    return data[:at] + other[start : start + chance.choice((8, 64, 1000))] + data[at + chance.choice((0, 8, 64)) :]


def _digits(data: bytes, chance: Random) -> bytes:
    """A number that is written out, replaced."""
    found = list(re.finditer(rb"-?\d+", data[: 1 << 16]))
    if not found:
        raise _NothingThere
    match = chance.choice(found)
    new = chance.choice((*_NUMBERS, *_EXTREMES, "1e999", "-1", "0x10", "9" * 400, "1.5", "true"))
    return data[: match.start()] + str(new).encode() + data[match.end() :]


def _words(data: bytes, chance: Random) -> bytes:
    at = _place(data, chance)
    return data[:at] + chance.choice(_TEXTS).encode("utf-8", "surrogatepass") + data[at:]


_BLIND: tuple[Mutation, ...] = (_byte, _bit, _cut, _remove, _insert, _repeat, _length, _length)


# --- JSON ----------------------------------------------------------------------------------------


class _Raw:
    """What json.dumps would never write, put in as text at the end."""

    def __init__(self, text: str) -> None:
        self.text = text


def _json(data: bytes, chance: Random) -> bytes:
    return _json_text(data, chance).encode("utf-8", "surrogatepass")


def _json_text(data: bytes, chance: Random) -> str:
    content = json.loads(data)
    box = [content]
    holder, key = chance.choice(list(_places(box)))
    edit = chance.randrange(8)
    if edit == 0 and holder is not box:
        del holder[key]
    elif edit == 1 and isinstance(holder, dict):
        _rename(holder, key, chance.choice([*_keys(content), *_TEXTS]))
    elif edit == 2:
        other, other_key = chance.choice(list(_places(box)))
        holder[key] = json.loads(json.dumps(other[other_key]))
    elif edit == 3 and isinstance(holder[key], str):
        at = chance.randint(0, len(holder[key]))
        holder[key] = holder[key][:at] + chance.choice(_TEXTS) + holder[key][at + chance.choice((0, 1, 9)) :]
    elif edit == 4 and isinstance(holder[key], int | float):
        old = int(holder[key]) if abs(holder[key]) < 2**70 else 0
        holder[key] = chance.choice((old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old), [old]))
    else:
        holder[key] = _value(chance)
    return _dumped(box[0])


def _places(box: Any) -> Iterator[tuple[Any, Any]]:
    """Every value, as what holds it and where."""
    stack = [box]
    while stack:
        holder = stack.pop()
        pairs = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
        for key, value in pairs[:400]:
            yield holder, key
            if isinstance(value, dict | list):
                stack.append(value)


def _keys(content: Any) -> list[str]:
    return [key for holder, key in _places([content]) if isinstance(holder, dict)]


def _rename(holder: dict[str, Any], key: str, new: str) -> None:
    """Another name at the same place: order is meaning to some readers."""
    pairs = [(new if name == key else name, value) for name, value in holder.items()]
    holder.clear()
    holder.update(pairs)


def _value(chance: Random) -> Any:
    kind = chance.randrange(7)
    if kind == 0:
        return chance.choice(_NUMBERS + _EXTREMES)
    if kind == 1:
        return chance.choice(_REALS)
    if kind == 2:
        return chance.choice(_TEXTS)
    if kind == 3:
        depth = chance.choice(_DEPTHS)
        return _Raw("[" * depth + "]" * depth if chance.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth)
    if kind == 4:
        return _Raw(chance.choice(("9" * 400, "1e999", "-1e999", "9" * 5000, '{"a": 1, "a": 2}', "1.0e-400")))
    if kind == 5:
        return {str(index): chance.choice(_NUMBERS) for index in range(chance.choice((0, 1, 300)))}
    return chance.choice((None, True, False, [], {}, [None], [[]], [""], [chance.choice(_TEXTS)] * 5, list(range(200))))


def _dumped(content: Any) -> str:
    raw: list[str] = []

    def kept(value: Any) -> Any:
        raw.append(value.text)
        return f"\x01{len(raw) - 1}\x01"

    text = json.dumps(content, default=kept, ensure_ascii=True)
    for index, piece in enumerate(raw):
        text = text.replace(f'"\\u0001{index}\\u0001"', piece)
    return text


# --- safetensors: a header's length, a header, numbers -------------------------------------------


def _safetensors(data: bytes, chance: Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if length > len(data) or not header:
        raise _NothingThere
    change = chance.choice((_json, _json, _tensor, _nested_json))
    new = change(header, chance)
    return len(new).to_bytes(8, "little") + new + data[8 + length :]


def _tensor(header: bytes, chance: Random) -> bytes:
    """One tensor in another shape of as many numbers, under another's name, or in another type."""
    content = json.loads(header)
    names = [name for name, entry in content.items() if isinstance(entry, dict) and "shape" in entry]
    if not names:
        raise _NothingThere
    name = chance.choice(names)
    entry, edit = content[name], chance.randrange(5)
    if edit == 0 and isinstance(entry["shape"], list):
        entry["shape"] = chance.choice((entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1], []))
    elif edit == 1:
        _rename(content, name, chance.choice(names).replace("A", "B"))
    elif edit == 2:
        pieces = name.split(".")
        pieces[chance.randrange(len(pieces))] = chance.choice(chance.choice(names).split("."))
        _rename(content, name, ".".join(pieces))
    elif edit == 3:
        entry["dtype"] = chance.choice(("F16", "BF16", "F64", "I64", "I8", "BOOL", "U8", "F8_E5M2", "I32"))
    else:
        content[name] = dict(content[chance.choice(names)])
    return _json_of(content)


def _nested_json(header: bytes, chance: Random) -> bytes:
    """JSON that stands as text in the metadata of a header."""
    content = json.loads(header)
    metadata = content.get("__metadata__") if isinstance(content, dict) else None
    texts = [key for key, text in metadata.items() if str(text)[:1] in "{["] if isinstance(metadata, dict) else []
    if not texts:
        raise _NothingThere
    key = chance.choice(texts)
    metadata[key] = _json_text(str(metadata[key]).encode("utf-8", "surrogatepass"), chance)
    return _json_of(content)


def _json_of(content: Any) -> bytes:
    return json.dumps(content).encode()


# --- zip archives, and what torch and numpy keep in them ------------------------------------------


def _zip(data: bytes, chance: Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at, edit = chance.randrange(len(members)), chance.randrange(8)
    if chance.random() < 0.5:  # the member that says what the others are
        at = next((index for index, (name, _) in enumerate(members) if name.endswith("data.pkl")), at)
    name, content = members[at]
    method = zipfile.ZIP_STORED
    if edit == 0:
        del members[at]
    elif edit == 1:
        members[at] = (chance.choice([*(name for name, _ in members), "../x", "a" * 300, ""]), content)
    elif edit == 2:
        members.append(members[at])
    elif edit == 3:
        method = zipfile.ZIP_DEFLATED
    else:
        members[at] = name, _member(name, content, chance)
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", method) as archive:  # names twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name or "x"), content, method)
    packed = out.getvalue()
    return packed.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0") if edit == 4 else packed


def _member(name: str, content: bytes, chance: Random) -> bytes:
    if name.endswith(".pkl"):
        return _pickle(content, chance)
    if name.endswith(".npy"):
        return _npy(content, chance)
    return chance.choice(_BLIND)(content, chance)


def _npy(data: bytes, chance: Random) -> bytes:
    """The header, a literal of Python."""
    end = 10 + int.from_bytes(data[8:10], "little")
    header = data[10:end]
    if chance.random() < 0.4:
        pieces = (b"(" * 3000, b"__import__('os')", b"1e999", b"9" * 5000, b"-1", b"'O'", b"(1,)*9", b"\0", b"[]", b"{")
        at = _place(header, chance)
        header = header[:at] + chance.choice(pieces) + header[at:]
    else:
        header = chance.choice((*_BLIND, _digits))(header, chance)
    return data[:8] + min(len(header), 65535).to_bytes(2, "little") + header + data[end:]


def _pickle(data: bytes, chance: Random) -> bytes:
    """An opcode removed, repeated, moved, or given another's argument."""
    marks = [place for _, _, place in pickletools.genops(data) if place is not None]
    ends = [*marks[1:], len(data)]
    pieces = [data[start:end] for start, end in zip(marks, ends, strict=True)]
    at, edit = chance.randrange(1, len(pieces) - 1), chance.randrange(6)
    if edit == 0:
        del pieces[at]
    elif edit == 1:
        pieces.insert(at, chance.choice(pieces[1:-1]))
    elif edit == 2:
        other = chance.randrange(1, len(pieces) - 1)
        pieces[at], pieces[other] = pieces[other], pieces[at]
    elif edit == 3:
        pieces.insert(at, chance.choice(_OPCODES))
    elif edit == 4:
        # Tuples that hold the one before twice.
        pieces[at:at] = [b"q\xf0h\xf0h\xf0\x86"] * chance.choice((1, 30, 3000))
    else:
        pieces[at] = pieces[at][:1] + chance.randbytes(len(pieces[at]) - 1)
    return data[: marks[0]] + b"".join(pieces)


# Small opcodes, whole: values, containers, what builds and what calls.
_OPCODES = (
    *(
        b"N",
        b"\x88",
        b"K\x01",
        b"K\xff",
        b"J\xff\xff\xff\xff",
        b"\x8a\x09" + b"\xff" * 8 + b"\x01",
        b"G\x7f\xf0" + bytes(6),
    ),
    *(b"]", b"}", b")", b"(", b"t", b"d", b"l", b"s", b"u", b"a", b"e", b"0", b"1", b"2", b"\x85", b"\x86", b"\x87"),
    *(b"Q", b"R", b"b", b"\x81", b"\x93", b"h\x00", b"q\x00", b"X\x01\0\0\0a", b"U\x01a", b"X\xff\xff\xff\xff"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(
        b"ccollections\nOrderedDict\n",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"\x95" + b"\xff" * 8,
        b"I99999999999999999999\n",
        b"F1e999\n",
    ),
)


# --- ONNX ----------------------------------------------------------------------------------------


def _protobuf(data: bytes, chance: Random) -> bytes:
    """A field set, cleared, copied or repeated somewhere in the model."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    messages = list(_messages(model))
    _edit_field(chance.choice(messages), messages, chance)
    return bytes(model.SerializePartialToString())


def _messages(message: Any) -> Iterator[Any]:
    stack = [message]
    while stack:
        current = stack.pop()
        yield current
        for field, value in current.ListFields():
            if field.message_type is not None:
                stack.extend(value if _is_repeated(value) else [value])


def _is_repeated(value: object) -> bool:
    return hasattr(value, "extend")


def _edit_field(message: Any, messages: Sequence[Any], chance: Random) -> None:
    fields = [field for field, _ in message.ListFields()]
    if not fields or chance.random() < 0.1:
        fields = list(message.DESCRIPTOR.fields)
    field = chance.choice(fields)
    value = getattr(message, field.name)
    if _is_repeated(value):
        _edit_list(value, field, messages, chance)
    elif field.message_type is not None:
        if chance.random() < 0.4:
            message.ClearField(field.name)
        else:
            _copy_like(value, messages, chance)
    elif chance.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(value, messages, chance))


def _edit_list(values: Any, field: Any, messages: Sequence[Any], chance: Random) -> None:
    edit = chance.randrange(4)
    at = chance.randrange(len(values)) if len(values) else 0
    if edit == 0 and len(values):
        del values[at]
    elif edit == 1 and field.message_type is not None:
        new = values.add()
        _copy_like(new, messages, chance)
        if chance.random() < 0.1 and new.ByteSize() < 200:
            for _ in range(1000):
                values.add().CopyFrom(new)
    elif edit == 2 and len(values) > 1:
        copies = list(values)
        chance.shuffle(copies)
        kept = list(copies)
        if field.message_type is None:
            values[:] = kept
        else:
            clones = [type(copy).FromString(copy.SerializePartialToString()) for copy in kept]
            del values[:]
            values.extend(clones)
    elif field.message_type is None:
        new = _scalar(values[at] if len(values) else _default_of(field), messages, chance)
        if len(values) and chance.random() < 0.7:
            values[at] = new
        else:
            values.extend([new] * chance.choice((1, 1, 1, 40)))
    elif len(values):
        _copy_like(values[at], messages, chance)


def _default_of(field: Any) -> Any:
    return "" if isinstance(field.default_value, list) and field.cpp_type == field.CPPTYPE_STRING else 0


def _copy_like(message: Any, messages: Sequence[Any], chance: Random) -> None:
    """Another message of the same kind in its place; a graph in itself may be one."""
    alike = [other for other in messages if type(other) is type(message)]
    if alike:
        copy = type(message).FromString(chance.choice(alike).SerializePartialToString())
        if copy.ByteSize() < _GROWTH:
            message.CopyFrom(copy)


def _scalar(old: Any, messages: Sequence[Any], chance: Random) -> Any:
    if isinstance(old, str):
        names = [value for message in messages for _, value in message.ListFields() if isinstance(value, str)]
        names += [str(value) for message in messages for name in getattr(message, "input", ()) for value in [name]]
        return chance.choice([*names, *(text for text in _TEXTS if text != "\ud800")])
    if isinstance(old, bytes):
        return chance.choice((old[:-1], old + b"\0", b"", old * 2, chance.choice(_BLIND)(old, chance)))
    if isinstance(old, float):
        return chance.choice(_REALS)
    limit = chance.choice((2**31, 2**63))
    return chance.choice(
        (old + 1, old - 1, -old, chance.randrange(30), chance.choice(_NUMBERS) % limit, limit - 1, -limit)
    )
