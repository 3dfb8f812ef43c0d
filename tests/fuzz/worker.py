"""One process of the fuzzer: makes mutants, gives them to a target, and says what came of it. It may be killed, or die
by itself: what it is doing stands in memory that the campaign reads."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from onnx_lora import OnnxLoraError
from tests.fuzz.mutate import mutate

__all__ = [
    "LIMITS",
    "Failure",
    "Limits",
    "Mutant",
    "Report",
    "available",
    "make_samples",
    "mutant",
    "samples_of",
    "work",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one input may take."""

    cpu: float  # seconds
    memory: int  # bytes by which the process's peak of resident memory may grow
    batch: int  # inputs handed out at once


LIMITS = {"memory": Limits(5, 256 * 2**20, 250), "model": Limits(30, 2**30, 8)}

# What reading may allocate beside the file's own bytes: Python's objects, and room for the largest config at once.
# Looked at for one input of so many: it costs time.
_TRACED_ROOM = 24 * 2**20  # bytes
_TRACED_EVERY = 16

# Address space beside what the process had: what is not for sale anywhere fails at once, with a MemoryError.
_ADDRESS_ROOM = 4 * 2**30  # bytes

Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """`make` writes whole samples, each in a folder of its own; `use` takes such a folder, mutated, and a place for
    what is written. `weight`: its share of the inputs. `needs`: modules without which there is no such target."""

    name: str
    kind: Literal["memory", "model"]
    make: Callable[[Path], None]
    use: Callable[[Path, Path], None]
    weight: float = 1.0
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mutant:
    """A sample's files, some of them changed."""

    sample: str
    whole: Files
    changed: Files

    @property
    def files(self) -> dict[str, bytes]:
        return {**self.whole, **self.changed}


@dataclass(frozen=True, slots=True)
class Failure:
    """What a target must not do. `kind`: foreign (an error that is none of ours), slow, memory, left behind (output of
    what was refused), hang, crash."""

    target: str
    index: int
    kind: str
    message: str
    place: str = ""  # the innermost line of ours
    trace: str = ""

    @property
    def signature(self) -> str:
        """Equal for failures that are probably one bug."""
        return f"{self.target}: {self.kind}: {self.message.split(':')[0]}: {self.place}"


@dataclass
class Report:
    """What came of a batch."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


def available(target: Target) -> bool:
    return all(importlib.util.find_spec(module) for module in target.needs)


def make_samples(table: str, folder: Path, names: list[str]) -> None:
    """Write the whole files of the named targets. Run in a process of its own: some load torch."""
    _be_quiet()
    for target in importlib.import_module(table).TARGETS:
        if target.name in names:
            shutil.rmtree(folder / target.name, ignore_errors=True)
            (folder / target.name).mkdir(parents=True)
            target.make(folder / target.name)


def samples_of(folder: Path) -> dict[str, Files]:
    samples: dict[str, Files] = {}
    for sample in sorted(folder.iterdir()):
        files = sorted(file for file in sample.rglob("*") if file.is_file())
        samples[sample.name] = {str(file.relative_to(sample)): file.read_bytes() for file in files}
    return samples


def mutant(samples: Mapping[str, Files], target: str, seed: int, index: int) -> Mutant:
    """The input of a number: always the same one."""
    chance = Random(f"{seed}/{target}/{index}")
    name = chance.choice(list(samples))
    whole = samples[name]
    others = [content for sample in samples.values() for content in sample.values()]
    chosen = chance.sample(sorted(whole), min(len(whole), chance.choice((1, 1, 1, 2))))
    return Mutant(name, whole, {file: mutate(whole[file], file, chance, others) for file in chosen})


def work(connection: Any, beat: Any, table: str, folder: str, seed: int, log: str) -> None:
    """Take (target, start, stop) from `connection` until None comes, and send a Report of each. `beat` holds the input
    that is worked on, and the process's CPU seconds when it began."""
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 2)  # what C libraries write is nobody's terminal's
    _be_quiet()
    targets = {target.name: target for target in importlib.import_module(table).TARGETS}
    with tempfile.TemporaryDirectory(prefix="onnx_lora.fuzz.", dir=_fast_folder()) as scratch:
        benches: dict[str, _Bench] = {}
        while (task := connection.recv()) is not None:
            name, start, stop = task
            if name not in benches:
                # Its first inputs, the whole files, load libraries, and may take their time.
                beat[0], beat[1] = -1, time.process_time()
                _limit_memory(None)
                samples = samples_of(Path(folder) / name)
                benches[name] = _Bench(targets[name], samples, Path(scratch) / name, seed)
                benches[name].warm_up()
            _limit_memory(_ADDRESS_ROOM)
            report = Report()
            for index in range(start, stop):
                beat[0], beat[1] = index, time.process_time()
                benches[name].run(index, report)
            beat[0], beat[1] = -1, time.process_time()
            connection.send(report)


@dataclass(frozen=True, slots=True)
class _Cost:
    """What an input took: CPU seconds, and bytes that Python allocated (0: not looked at) or the process grew by."""

    cpu: float
    allocated: int
    grown: int


class _Bench:
    """A target with a folder to work in."""

    def __init__(self, target: Target, samples: Mapping[str, Files], folder: Path, seed: int) -> None:
        self._target, self._samples, self._seed = target, samples, seed
        self._inputs, self._out = folder / "in", folder / "out"

    def warm_up(self) -> None:
        """Every whole sample is taken. Raises AssertionError: one is not, and its mutants would show nothing."""
        self._out.mkdir(parents=True)
        for sample, files in self._samples.items():
            write(files, self._inputs / sample)
            try:
                self._target.use(self._inputs / sample, self._out)
            except OnnxLoraError as error:
                raise AssertionError(f"{self._target.name}: the whole sample {sample} is refused: {error}") from error
            self._clear()

    def run(self, index: int, report: Report) -> None:
        made = mutant(self._samples, self._target.name, self._seed, index)
        refused = False
        place = self._inputs / made.sample
        write(made.changed, place)
        traced = self._target.kind == "memory" and index % _TRACED_EVERY == 0
        if traced:
            tracemalloc.start()
        peak, began = _peak_memory(), time.process_time()
        try:
            self._target.use(place, self._out)
            report.outcomes["accepted"] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - what this is all about
            refused = isinstance(error, OnnxLoraError) and type(error).__name__ != "InternalError"
            report.outcomes["refused" if refused else "failed"] += 1
            if not refused:
                self._fail(report, index, "foreign", error)
        finally:
            spent = time.process_time() - began
            allocated = tracemalloc.get_traced_memory()[1] if traced else 0
            tracemalloc.stop()
            grown = _peak_memory() - peak
        self._check(report, index, made, _Cost(spent, allocated, grown), refused=refused)
        self._clear()
        write({file: made.whole[file] for file in made.changed}, place)

    def _check(self, report: Report, index: int, made: Mutant, cost: _Cost, *, refused: bool) -> None:
        limits = LIMITS[self._target.kind]
        if cost.cpu > limits.cpu:
            self._fail(report, index, "slow", f"it took {cost.cpu:.1f} CPU seconds")
        if cost.allocated > _TRACED_ROOM + 2 * sum(map(len, made.files.values())):
            self._fail(report, index, "memory", f"{cost.allocated >> 20} MiB were allocated")
        if cost.grown > limits.memory:
            self._fail(report, index, "memory", f"the process grew by {cost.grown >> 20} MiB")
        if left := [entry.name for entry in self._out.iterdir() if refused or entry.name.startswith(".")]:
            self._fail(report, index, "left behind", f"files: {left}")

    def _fail(self, report: Report, index: int, kind: str, error: BaseException | str) -> None:
        if isinstance(error, str):
            report.failures.append(Failure(self._target.name, index, kind, error))
            return
        message = f"{type(error).__module__}.{type(error).__name__}: {str(error)[:500]}".replace("\n", " ")
        trace = "".join(traceback.format_exception(error, limit=-12))[-6000:]
        report.failures.append(Failure(self._target.name, index, kind, message, _innermost(error), trace))

    def _clear(self) -> None:
        for entry in self._out.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _innermost(error: BaseException) -> str:
    """The last line of ours that an error, or what caused it, went through."""
    if error.__cause__ is not None and type(error).__name__ == "InternalError":
        error = error.__cause__
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "onnx_lora" in Path(frame.filename).parts]
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda *_: None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _fast_folder() -> str | None:
    """Memory, where the platform has such a folder."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and os.access(shared, os.W_OK) else None


def _peak_memory() -> int:
    """Bytes of resident memory that the process had at most; 0 where the platform does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _limit_memory(room: int | None) -> None:
    """Let the process have so much address space more than now; None lifts the limit. Only where it can be had."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return
    import resource

    soft = resource.RLIM_INFINITY if room is None else int(statm.read_text().split()[0]) * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))
