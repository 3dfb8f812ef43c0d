"""The pickle of a state dict, read as data: what torch.save writes, and nothing else. It runs nothing, makes no object
of a class, and knows no file.

A pickle is a program. The few instructions of those that torch.save writes are carried out here, on texts, numbers,
tuples, lists and dictionaries, and every other instruction and name is refused. Nothing is compared, hashed or printed
before its type is known: a kB of tuples that hold each other has more members than there are atoms."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from onnx_lora.adapters.problems import TensorError

__all__ = ["STORAGES", "Storage", "Tensor", "read_program"]

# The classes of storages, by the name of numpy's type.
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}

# A tensor takes 30 of them. Four millions take eight seconds, and are 130,000 tensors.
_MOST_INSTRUCTIONS = 4_000_000

_DEEPEST = 100  # open tuples, lists and dictionaries; torch.save has five
_MOST_AXES = 32


@dataclass(frozen=True)
class Storage:
    kind: str  # a key of STORAGES
    key: str
    count: int  # elements


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


@dataclass(frozen=True)
class _Name:
    """A name of Python's that may be called, or, of a storage's class, may stand in its description."""

    module: str
    name: str


# Instructions that put a value on the stack: their argument, or one of their own.
_NUMBERS = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"})
_TEXTS = frozenset({"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})
_PUSHES = _NUMBERS | _TEXTS
_BYTES = frozenset({"STRING", "BINSTRING", "SHORT_BINSTRING"})  # of Python 2, where text was that
_MAKES: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_program(file: BinaryIO) -> Any:
    """The value of the pickle that begins here; `file` stands behind it then.

    Raises TensorError. ValueError, IndexError, KeyError: damaged.
    """
    machine = _Machine()
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        if count > _MOST_INSTRUCTIONS:
            raise TensorError(f"it has more than {_MOST_INSTRUCTIONS} instructions")
        machine.do(instruction.name, argument)
    return machine.pop()


class _Machine:
    """The stack, the marks in it, and what was put aside to be used again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _BYTES:
            self.stack.append(argument.encode("latin-1").decode("utf-8"))
        elif name in _MAKES:
            self.stack.append(_MAKES[name]())
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            own = getattr(self, f"_{name.lower()}", None)
            if own is None:
                raise TensorError(f"it has the instruction {name}, which no file of tensors needs")
            own(argument)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an instruction takes more than there is")
        return self.stack.pop()

    def _mark(self, argument: Any) -> None:
        del argument
        if len(self.marks) >= _DEEPEST:
            raise TensorError(f"it has values in more than {_DEEPEST} others")
        self.marks.append(len(self.stack))

    def _marked(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        place = self.marks.pop()
        items, self.stack[place:] = self.stack[place:], []
        return items

    def _tuple(self, argument: Any) -> None:
        del argument
        self.stack.append(tuple(self._marked()))

    def _list(self, argument: Any) -> None:
        del argument
        self.stack.append(self._marked())

    def _dict(self, argument: Any) -> None:
        del argument
        items = self._marked()
        self.stack.append({})
        self._set(items)

    def _append(self, argument: Any) -> None:
        del argument
        self._extend([self.pop()])

    def _appends(self, argument: Any) -> None:
        del argument
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TensorError("it appends to what is no list")
        self.stack[-1].extend(items)

    def _setitem(self, argument: Any) -> None:
        del argument
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def _setitems(self, argument: Any) -> None:
        del argument
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise TensorError("it sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise TensorError(f"a key is a {type(key).__name__}, not a tensor's name")
            self.stack[-1][key] = value

    def _build(self, argument: Any) -> None:
        """Attributes of a state dict (`_metadata`), which say nothing of its tensors."""
        del argument
        self.pop()
        if type(self.stack[-1]) is not dict:
            raise TensorError("it sets attributes of what is no state dict")

    def _global(self, argument: Any) -> None:
        self._put_name(*argument.split(" ", 1))

    def _stack_global(self, argument: Any) -> None:
        del argument
        name, module = self.pop(), self.pop()
        self._put_name(module, name)

    def _put_name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TensorError("it asks for a name that is no text")
        if (module, name) not in _CALLS and not (module == "torch" and name in STORAGES):
            raise TensorError(f"it asks for {module[:100]}.{name[:100]}, which no file of tensors needs")
        self.stack.append(_Name(module, name))

    def _reduce(self, argument: Any) -> None:
        del argument
        arguments, name = self.pop(), self.pop()
        call = _CALLS.get((name.module, name.name)) if type(name) is _Name else None
        if call is None or type(arguments) is not tuple:
            raise TensorError("it calls what is no function of torch's")
        self.stack.append(call(arguments))

    def _binpersid(self, argument: Any) -> None:
        del argument
        self.stack.append(_storage(self.pop()))


def _storage(description: Any) -> Storage:
    """`("storage", class, key, device, elements)`, as torch.save describes one."""
    if type(description) is not tuple or not 5 <= len(description) <= 6:
        raise TensorError("it names a storage in a way not known here")
    tag, kind, key, _, count, *view = description
    if type(tag) is not str or tag != "storage" or type(kind) is not _Name or kind.name not in STORAGES:
        raise TensorError("it names a storage in a way not known here")
    if type(key) not in (str, int):
        raise TensorError("it names a storage by what is no text")
    if view and view[0] is not None:
        raise TensorError("it uses storages that are views of others (torch before 0.4)")
    return Storage(kind.name, str(key), _size(count, "size of a storage"))


def _size(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise TensorError(f"impossible {what}")
    return value


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if type(value) not in (tuple, list) or len(value) > _MOST_AXES:
        raise TensorError(f"impossible {what}")
    return tuple(_size(size, what) for size in value)


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """`OrderedDict()`; Python 2 gave it its items, a list of pairs."""
    machine = _Machine()
    machine.stack.append({})
    for pairs in arguments:
        if type(pairs) is not list or not all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs):
            raise TensorError("a dictionary of what are no pairs")
        for pair in pairs:
            machine._set(list(pair))
    made: dict[Any, Any] = machine.pop()
    return made


def _rebuilt(arguments: tuple[Any, ...]) -> Tensor:
    """`torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, …)`."""
    if len(arguments) < 4 or type(arguments[0]) is not Storage:
        raise TensorError("a tensor with an impossible storage")
    storage, offset, shape, strides = arguments[:4]
    tensor = Tensor(storage, _size(offset, "offset"), _sizes(shape, "shape"), _sizes(strides, "stride"))
    if len(tensor.shape) != len(tensor.strides):
        raise TensorError("a tensor whose shape and strides differ in length")
    return tensor


def _first(arguments: tuple[Any, ...]) -> Any:
    """`torch._utils._rebuild_parameter(tensor, …)`."""
    if not arguments or type(arguments[0]) is not Tensor:
        raise TensorError("a parameter of what is no tensor")
    return arguments[0]


def _size_of_torch(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    if len(arguments) != 1:
        raise TensorError("impossible shape")
    return _sizes(arguments[0], "shape")


_CALLS: Mapping[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch", "Size"): _size_of_torch,
    ("torch._utils", "_rebuild_tensor"): _rebuilt,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): _first,
}
