"""Nothing foreign leaves a public function, whatever it is given; and what the boundary lets pass."""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from onnx_lora import AdapterSession, Package, TextGenerator, bind, errors, read_adapter
from onnx_lora.boundary import public
from onnx_lora.demo_text import WRITER
from onnx_lora.errors import ExportError, InputError, InternalError, OnnxLoraError, OutsideError, StorageError
from onnx_lora.exporter import attach, export
from onnx_lora.runtime import Sampling

# Every module that says what is public. A name that is added there is fuzzed.
MODULES = [
    "onnx_lora",
    "onnx_lora.adapters",
    "onnx_lora.adapters.write",
    "onnx_lora.exporter",
    "onnx_lora.exporter.quantization",
    "onnx_lora.exporter.verification.verify",
    "onnx_lora.runtime",
]

# Plain data, and types for checkers: they refuse nothing, and what they are given to does.
DATA = [
    "Adapter",
    "BoundAdapter",
    "Change",
    "Comparison",
    "TextComparison",
    "TriedAdapter",
    "Coverage",
    "Delta",
    "MatrixDelta",
    "FORMATS",
    "Generation",
]
DATA += ["Advice", "CallTimes", "GraphMeasurement", "Measurement"]
DATA += ["Checkpoint", "OnnxFiles", "Pipeline", "TorchModule"]
DATA += ["Origin", "Piece", "Replacement", "Rounding", "__version__"]
DATA += [name for name in errors.__all__ if name[0].isupper()]

# Called by the package alone, with what it has checked.
OURS = ["Cache", "Stream", "verify_original"]

# Of these every third value is tried for each argument: a call reads a model.
SLOW = frozenset(["AdapterSession", "TextGenerator", "attach", "export", "fold", "fold_to", "measure", "quantize"])

# What makes a call short, where its own defaults do not.
SHORT: dict[str, dict[str, Any]] = {"measure": {"rounds": 1, "tokens": 2, "threads": 1}}


@dataclass
class World:
    """Valid values for arguments, by name."""

    folder: Path
    package: Path
    adapter: Path
    count: int = 0

    def new_path(self, suffix: str = "") -> Path:
        self.count += 1
        return self.folder / f"out{self.count}{suffix}"

    @functools.cached_property
    def opened(self) -> Package:
        return Package.open(self.package)

    @functools.cached_property
    def bound(self) -> Any:
        return bind(read_adapter(self.adapter), self.opened)

    def session(self) -> AdapterSession:
        session = AdapterSession(self.package)
        session.load_adapter("a", self.adapter)
        return session

    def generator(self) -> TextGenerator:
        return TextGenerator(self.session())

    def valid(self, where: str, name: str) -> Any:
        """What makes a call of `where` work as far as this argument goes."""
        own: dict[str, Any] = {
            "write_bound.adapter": self.bound,
            "bind.package": self.opened,
            "bind.adapter": read_adapter(self.adapter),
            "write_adapter.adapter": read_adapter(self.adapter),
            "write_adapter.package": self.opened,
            "write_adapter.format": "peft",
            "verify.package": self.opened,
            "Package.graph.name": None,
            "Package.read.stored": next(iter(self.opened.points.values())).parts[0].stored,
            "load_adapter.name": f"new{self.count}",
        }
        values: dict[str, Any] = {
            "path": self.adapter,
            "package": self.package,
            "adapter": self.adapter,
            "bound": self.bound,
            "parts": [(self.bound, 1.0)],
            "rows": [self.bound, None],
            "checkpoint": WRITER / "model",
            "onnx_file": WRITER / "model" / "model.onnx",
            "model": self.folder,
            "prompt": "Once",
            "messages": [{"role": "user", "content": "Hello"}],
            "sampling": Sampling(2),
            "point": next(iter(self.opened.points.values())),
            "part": next(iter(self.opened.points.values())).parts[0],
            "stored": next(iter(self.opened.points.values())).parts[0].stored,
            "weight": next(iter(self.opened.replaceable.values()), None),
            "output_names": None,
            "input_feed": {},
            "name": "a",
        }
        short = where.rpartition(".")[2]
        for key in (f"{where}.{name}", f"{short}.{name}"):
            if key in own:
                return own[key]
        if name == "out":
            return self.new_path(".safetensors" if "write_bound" in where else "")
        return values.get(name)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some odd values are good names of outputs, which must not be written where the tests run."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    attach(WRITER / "model", folder / "package")
    return World(folder, folder / "package", sorted((WRITER / "adapters").iterdir())[0])


def _hostile(world: World) -> Iterator[tuple[str, Any]]:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    circle: dict[str, Any] = {}
    circle["a"] = circle
    closed = (world.folder / "closed").open("wb")
    closed.close()
    pipe = world.folder / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    loop = world.folder / "loop"
    if not loop.is_symlink():
        loop.symlink_to(loop)
    yield from {
        "None": None,
        "bytes": b"x",
        "zero": 0,
        "minus": -1,
        "large": 10**400,
        "half": 1.5,
        "nan": float("nan"),
        "true": True,
        "empty": "",
        "text": "text",
        "nul": "\0",
        "surrogate": "\ud800",
        "escaped byte": "\udcff",
        "long": "x" * 5000,
        "control": "\x1b[31m\u202e",
        "list": [],
        "list of None": [None],
        "list of text": ["\0", "\ud800"],
        "deep": deep,
        "dict": {},
        "dict of nan": {"a": float("nan")},
        "circle": circle,
        "object": object(),
        "type": int,
        "array": np.zeros((2, 2)),
        "object array": np.array([None, {}], dtype=object),
        "closed file": closed,
        "missing": world.folder / "nowhere" / "at all",
        "inside a file": world.folder / "closed" / "x",
        "file": world.folder / "closed",
        "folder": world.folder,
        "pipe": pipe,
        "loop": loop,
        "device": Path("/dev/null"),
        "no path": Path("\0"),
    }.items()


def _entries() -> Iterator[tuple[str, str, str]]:
    """Every public function and method: module, name, method or ""."""
    seen: set[int] = set()
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            thing = getattr(importlib.import_module(module), name)
            if name in (*DATA, *OURS) or id(thing) in seen:
                continue
            seen.add(id(thing))
            yield module, name, ""
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    if not method.startswith("_") and inspect.isfunction(getattr(value, "__func__", value)):
                        yield module, name, method


def _target(world: World, module: str, name: str, method: str) -> Callable[..., Any]:
    thing: Any = getattr(importlib.import_module(module), name)
    if not method:
        return thing  # type: ignore[no-any-return]
    if name == "AdapterSession":
        thing = world.session()
    elif name == "TextGenerator":
        thing = world.generator()
    elif name == "Package":
        thing = world.opened
    elif name == "Requantize":
        thing = thing(world.opened)
    else:
        thing = thing()
    return getattr(thing, method)  # type: ignore[no-any-return]


def _values(world: World, name: str, argument: str) -> Iterator[tuple[str, Any]]:
    for label, value in _hostile(world):
        skipped = name in SLOW and crc32(f"{name} {argument} {label}".encode()) % 3
        # What a caller's own function raises passes.
        if not skipped and not (argument == "progress" and callable(value)):
            yield label, value


def _faults(call: Callable[[], Any]) -> str | None:
    """What of a call's end is not as promised."""
    try:
        result = call()
        if hasattr(result, "__next__"):
            list(result)
    except InternalError as error:
        return str(error)
    except OnnxLoraError as error:
        text = str(error)
        return None if len(text) < 100_000 and "\x1b" not in text else f"unfit for a terminal: {text[:200]!r}"
    except Exception as error:  # noqa: BLE001 - what the test looks for
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


# Warnings travel from a test process to the one that reports, and half a character cannot.
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("module, name, method", list(_entries()))
def test_only_our_errors_leave(world: World, module: str, name: str, method: str) -> None:
    target = _target(world, module, name, method)
    where = ".".join(filter(None, (name, method)))
    parameters = {
        key: value for key, value in inspect.signature(target).parameters.items() if value.kind is not value.VAR_KEYWORD
    }
    needed = [key for key, value in parameters.items() if value.default is inspect.Parameter.empty]
    found: list[str] = []
    for bad in parameters:
        for label, value in _values(world, name, bad):
            arguments = {key: world.valid(where, key) for key in needed if key != bad}
            arguments |= SHORT.get(where, {}) | {bad: value}
            if fault := _faults(functools.partial(target, **arguments)):
                found.append(f"{bad}={label}: {fault}")
    assert not found, "\n".join([where, *found])


def test_every_public_function_is_behind_the_boundary() -> None:
    for module, name, method in _entries():
        thing = getattr(importlib.import_module(module), name)
        function = vars(thing)[method] if method else vars(thing).get("__init__", thing)
        function = getattr(function, "__func__", function)
        assert hasattr(function, "__wrapped__"), f"{module}.{name}.{method} is not marked as public"


@pytest.mark.parametrize(
    "number, kind",
    [
        (errno.ENOSPC, StorageError),
        (errno.EDQUOT, StorageError),
        (errno.EFBIG, StorageError),
        (errno.EMFILE, StorageError),
        (errno.ENFILE, StorageError),
        (errno.EACCES, StorageError),
        (errno.EROFS, StorageError),
        (errno.EIO, StorageError),
        (errno.ENOENT, InputError),
        (errno.ENOTDIR, InputError),
        (errno.EISDIR, InputError),
        (errno.ELOOP, InputError),
        (errno.ENAMETOOLONG, InputError),
        (errno.ENOMEM, OutsideError),
    ],
)
def test_what_the_system_refuses_has_its_kind_and_its_path(number: int, kind: type[OnnxLoraError]) -> None:
    @public
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/the/file")

    with pytest.raises(OnnxLoraError) as caught:
        fail()
    assert type(caught.value) is kind
    assert caught.value.path == "/the/file"
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    "failure, kind",
    [(MemoryError(), OutsideError), (RecursionError(), InputError), (KeyError("x"), InternalError)],
    ids=lambda value: str(value),
)
def test_what_nobody_foresaw_is_told_apart(failure: Exception, kind: type[OnnxLoraError]) -> None:
    @public
    def fail(path: str) -> None:
        raise failure

    with pytest.raises(OnnxLoraError) as caught:
        fail("text")
    assert type(caught.value) is kind
    assert caught.value.__cause__ is failure


def test_a_wrong_argument_is_named_where_the_call_fails() -> None:
    @public
    def shout(text: str, *, times: int = 1) -> str:
        return text.upper() * times

    assert shout("a", times=2) == "AA"
    with pytest.raises(InputError, match=r"text must be str, and is NoneType|text must be str, and is None"):
        shout(None)
    with pytest.raises(InputError, match="times must be int, and is str"):
        shout("a", times="b")


def test_panics_of_rust_do_not_pass() -> None:
    class PanicException(BaseException):
        pass

    @public
    def fail() -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    with pytest.raises(InternalError, match="unwrap"):
        fail()


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(143), GeneratorExit(), StopIteration()])
def test_what_ends_a_program_or_an_iteration_passes(ending: BaseException) -> None:
    @public
    def fail() -> None:
        raise ending

    with pytest.raises(type(ending)) as caught:
        fail()
    assert caught.value is ending


def test_what_a_callers_function_raises_passes(world: World) -> None:
    class CancelledError(Exception):
        pass

    def cancel(*_: object) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        attach(WRITER / "model", world.new_path(), progress=cancel)


def test_a_call_that_python_refuses_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        read_adapter("x", nonsense=1)


def test_nested_calls_are_translated_once() -> None:
    @public
    def inner() -> None:
        raise KeyError("x")

    @public
    def outer() -> None:
        inner()

    with pytest.raises(InternalError) as caught:
        outer()
    assert isinstance(caught.value.__cause__, KeyError)


def test_signatures_and_docstrings_stay() -> None:
    assert "run_options" in inspect.signature(AdapterSession.run).parameters
    assert "with the adapter of this call" in (AdapterSession.run.__doc__ or "")
    assert isinstance(vars(Package)["open"], staticmethod)
    assert isinstance(vars(AdapterSession)["graph"], property)


def test_a_librarys_unexplained_failure_is_an_export_error() -> None:
    from onnx_lora.exporter.frontends.failures import library_failures

    with pytest.raises(ExportError, match="IndexError"), library_failures("model", "exported"):
        raise IndexError("list index out of range")


def test_too_many_open_files_are_not_a_damaged_package(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="ulimit -n"):
        Package.open(world.package)


@pytest.mark.parametrize("path", [5, b"x", [], {}, object()])
@pytest.mark.parametrize("source", ["Checkpoint", "OnnxFiles", "Pipeline"])
def test_what_is_wrong_inside_a_source_is_the_callers(tmp_path: Path, source: str, path: object) -> None:
    given = getattr(importlib.import_module("onnx_lora"), source)(path)
    with pytest.raises(InputError, match=r"model\.\w+ must be str \| os\.PathLike\[str\]"):
        export(given, tmp_path / "out")
