"""A whole run: which inputs, handed to which process, how far it came, and what was found. It knows processes and
files; what is done with an input, the targets know.

Everything lies in one folder: `state.json` says how far the run came, so that a stopped one goes on; `failures/` has a
folder for each failure with the very files, the report, and the command that repeats it."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.fuzz.worker import LIMITS, Failure, Report, available, make_samples, mutant, samples_of, work, write

__all__ = ["Plan", "Summary", "run"]

# Every start is fresh: a fork of a process with threads (ONNX Runtime's, torch's) may hang.
_CONTEXT = multiprocessing.get_context("spawn")

# How often the state is written, and the clocks are looked at.
_TICK = 0.5  # seconds
_SAVED_EVERY = 5.0  # seconds

# A process that waits instead of computing is ended after so many times its CPU seconds.
_WALL = 20

# Loading torch and the exporters, and the whole samples.
_WARM_UP = 300.0  # CPU seconds

# Of failures that look alike so many are kept, as files.
_ALIKE = 3

# A process that died during its first inputs, the whole samples, is not started again more often than this.
_BAD_STARTS = 3


@dataclass(frozen=True)
class Plan:
    """`memory`, `model`: how many inputs the targets of each kind share. `seconds`: when to stop, finished or not."""

    folder: Path
    seed: int = 0
    memory: int = 1_000_000
    model: int = 20_000
    seconds: float | None = None
    jobs: int = 1
    only: Sequence[str] = ()
    table: str = "tests.fuzz.targets"


@dataclass
class Summary:
    """How far a campaign came. `seconds`: of all its runs."""

    seed: int
    planned: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    done: dict[str, list[int]] = field(default_factory=dict)  # batches
    failures: dict[str, int] = field(default_factory=dict)  # how often, by signature
    kept: list[str] = field(default_factory=list)  # folders
    skipped: dict[str, list[str]] = field(default_factory=dict)  # targets, and the modules they need
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return sum(sum(counts.values()) for counts in self.outcomes.values())

    @property
    def finished(self) -> bool:
        return self.tried >= sum(self.planned.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def read(file: Path, seed: int) -> Summary:
        """What a run before left; a fresh one where there is none, or its seed was another."""
        try:
            data = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            return Summary(seed)
        if data["seed"] != seed:
            raise SystemExit(f"{file}: this run has seed {data['seed']}; give that, or another --state")
        return Summary(**data)


@dataclass
class _Batch:
    target: str
    kind: str
    number: int
    start: int
    stop: int


class _Process:
    """A worker and what it does."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.log = plan.folder / f"worker.{number}.log"
        self.log.unlink(missing_ok=True)
        self.connection, theirs = _CONTEXT.Pipe()
        self.beat = _CONTEXT.Array("d", [-1.0, 0.0])
        arguments = (theirs, self.beat, plan.table, str(plan.folder / "samples"), plan.seed, str(self.log))
        self.process = _CONTEXT.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.batch: _Batch | None = None
        self._seen, self._since = -2.0, time.monotonic()

    def give(self, batch: _Batch) -> None:
        self.batch = batch
        self._since = time.monotonic()
        self.connection.send((batch.target, batch.start, batch.stop))

    @property
    def index(self) -> int:
        """The input it works on; -1 before the first."""
        return int(self.beat[0])

    def hangs(self) -> bool:
        """Whether the input it works on has had its time. Looked at every tick."""
        index, began = self.beat[:]
        if index != self._seen:
            self._seen, self._since = index, time.monotonic()
        if self.batch is None:
            return False
        limit = _WARM_UP if index < 0 else 2 * LIMITS[self.batch.kind].cpu
        spent = _cpu_of(self.process.pid) - began
        return spent > limit or time.monotonic() - self._since > _WALL * limit

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(plan: Plan, tell: Callable[[Summary], None] = lambda _: None) -> Summary:
    """Try what the plan says and was not tried yet. `tell` hears of progress."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    state = plan.folder / "state.json"
    summary = Summary.read(state, plan.seed)
    chosen = _targets(plan, summary)
    _make(plan, [target.name for target in chosen])
    began, before = time.monotonic(), summary.seconds
    waiting = deque(_batches(plan, chosen, summary))
    processes: list[_Process] = []
    saved, bad = 0.0, 0
    try:
        while True:
            summary.seconds = before + time.monotonic() - began
            over = plan.seconds is not None and time.monotonic() - began > plan.seconds
            if over or (not waiting and all(process.batch is None for process in processes)):
                break
            while waiting and len(processes) < plan.jobs:
                processes.append(_Process(plan, len(processes)))
            for process in processes:
                if process.batch is None and waiting:
                    process.give(waiting.popleft())
            wait([process.connection for process in processes], timeout=_TICK)
            for position, process in enumerate(processes):
                rest = _look_after(process, plan, summary)
                if rest is None:
                    continue
                bad = bad + 1 if process.index < 0 else 0
                if bad >= _BAD_STARTS:
                    raise SystemExit(f"no worker gets through its samples; {process.log} says why")
                waiting.extendleft(reversed(rest))
                processes[position] = _Process(plan, position)
            tell(summary)
            if time.monotonic() - saved > _SAVED_EVERY:
                saved = time.monotonic()
                _save(state, summary)
    finally:
        for process in processes:
            process.kill()
        _save(state, summary)
    return summary


def _targets(plan: Plan, summary: Summary) -> list[Any]:
    table = importlib.import_module(plan.table).TARGETS
    named = [target for target in table if not plan.only or target.name in plan.only]
    if unknown := sorted(set(plan.only) - {target.name for target in table}):
        raise SystemExit(f"no such target: {', '.join(unknown)}; there are {', '.join(t.name for t in table)}")
    summary.skipped = {target.name: list(target.needs) for target in named if not available(target)}
    return [target for target in named if available(target)]


def _make(plan: Plan, names: list[str]) -> None:
    process = _CONTEXT.Process(target=make_samples, args=(plan.table, plan.folder / "samples", names))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the samples cannot be made; see above")


def _batches(plan: Plan, targets: Sequence[Any], summary: Summary) -> Iterator[_Batch]:
    """What is left, in an order in which every beginning has something of every target."""
    found: list[tuple[float, _Batch]] = []
    for target in targets:
        share = sum(other.weight for other in targets if other.kind == target.kind)
        total = round((plan.memory if target.kind == "memory" else plan.model) * target.weight / share)
        size, done = LIMITS[target.kind].batch, set(summary.done.setdefault(target.name, []))
        summary.planned[target.name] = total
        summary.outcomes.setdefault(target.name, {})
        for number, start in enumerate(range(0, total, size)):
            if number not in done:
                batch = _Batch(target.name, target.kind, number, start, min(start + size, total))
                found.append((start / total, batch))
    found.sort(key=lambda pair: pair[0])
    return (batch for _, batch in found)


def _look_after(process: _Process, plan: Plan, summary: Summary) -> list[_Batch] | None:
    """Take in a worker's report. If it died or hangs: what is left of its batch, without the input it died of."""
    batch = process.batch
    try:
        if process.connection.poll():
            report: Report = process.connection.recv()
            assert batch is not None
            process.batch = None
            _take_in(report, batch, plan, summary)
            summary.done[batch.target].append(batch.number)
            return None
    except (EOFError, OSError):
        pass
    hung = process.hangs()
    if process.process.is_alive() and not hung:
        return None
    index = process.index
    process.kill()
    if batch is None:
        return []
    if index < batch.start:
        return [batch]
    kind, code = ("hang" if hung else "crash"), process.process.exitcode
    message = "it did not end" if hung else f"the process died of {-code if code else code}"
    report = Report(Counter({kind: 1}), [Failure(batch.target, index, kind, message)])
    _take_in(report, batch, plan, summary)
    # What came before it in the batch is tried again: nobody knows what came of it.
    parts = [(batch.start, index), (index + 1, batch.stop)]
    left = [_Batch(batch.target, batch.kind, batch.number, start, stop) for start, stop in parts if start < stop]
    if not left:
        summary.done[batch.target].append(batch.number)
    return left


def _take_in(report: Report, batch: _Batch, plan: Plan, summary: Summary) -> None:
    counts = Counter(summary.outcomes[batch.target])
    summary.outcomes[batch.target] = dict(counts + report.outcomes)
    for failure in report.failures:
        count = summary.failures[failure.signature] = summary.failures.get(failure.signature, 0) + 1
        if count <= _ALIKE:
            summary.kept.append(str(_keep(failure, plan)))


def _keep(failure: Failure, plan: Plan) -> Path:
    """The files of an input that failed, what happened, and how to see it again."""
    name = re.sub(r"\W+", "-", failure.target)
    mark = hashlib.sha256(failure.signature.encode()).hexdigest()[:6]
    folder = plan.folder / "failures" / f"{name}-{mark}-{plan.seed}-{failure.index}"
    shutil.rmtree(folder, ignore_errors=True)
    made = mutant(samples_of(plan.folder / "samples" / failure.target), failure.target, plan.seed, failure.index)
    write(made.files, folder / "files")
    report = asdict(failure) | {
        "seed": plan.seed,
        "sample": made.sample,
        "changed": sorted(made.changed),
        "again": f"python -m tests.fuzz --replay {folder}",
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    return folder


def _save(state: Path, summary: Summary) -> None:
    written = state.with_suffix(".part")
    written.write_text(summary.to_json(), "utf-8")
    written.replace(state)


def _cpu_of(pid: int | None) -> float:
    """CPU seconds of a process, as its own clock counts them."""
    import psutil

    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def jobs() -> int:
    """Processes at once: one for every core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
