"""Fold or delta? Both are run on the user's package and device, beside the base, and the times compared. It knows how
to run each of them; `advising.py` knows what follows."""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lora.adapters import BoundAdapter
from onnx_lora.boundary import public
from onnx_lora.errors import (
    BindError,
    FeedError,
    InputError,
    MissingDependencyError,
    PackageError,
    RunError,
)
from onnx_lora.manifest import GraphInfo
from onnx_lora.onnxruntime_errors import fail_in_run
from onnx_lora.package import Package
from onnx_lora.points import Array
from onnx_lora.runtime._ort import Device, Options, Providers, copy_options, ort, start_session
from onnx_lora.runtime.advising import advise
from onnx_lora.runtime.binding import AnyAdapter, AnyPackage, Mixture, bind_blend, open_package
from onnx_lora.runtime.folding import fold, folded_bytes
from onnx_lora.runtime.generation.decoder import Decoder
from onnx_lora.runtime.generation.families import make_memory
from onnx_lora.runtime.generation.graph import DecoderGraph
from onnx_lora.runtime.generation.settings import Settings
from onnx_lora.runtime.lease import Lease
from onnx_lora.runtime.made_feeds import Sizes, make_feeds
from onnx_lora.runtime.measurement import CallTimes, GraphMeasurement, Measurement
from onnx_lora.runtime.requantize import Requantize
from onnx_lora.runtime.session import AdapterSession
from onnx_lora.runtime.timing import Contender, Limits, take_turns

__all__ = ["measure"]

# Called with what is measured, the rounds done, and how many there are at most.
MeasureProgress = Callable[[str, int, int], object]

# What the adapter is loaded as.
_NAME = "measured"

# A text is written on for so many tokens before the next one begins; a context may end it earlier.
_NEW_TOKENS = 256

# ONNX Runtime starts as many as it is told, and a process that is starting hundreds of thousands cannot be interrupted.
_MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class _Sessions:
    """A graph, started in every way that is compared."""

    base: Any
    points: AdapterSession
    folded: Any | None
    has_delta: bool


@dataclass(frozen=True, slots=True)
class _Start:
    """What starting took, in seconds and bytes."""

    base: float
    points: float
    load: float | None
    fold: float | None
    folded_resident_bytes: int | None


@public
def measure(
    package: AnyPackage,
    adapter: AnyAdapter | Mixture,
    *,
    graph: str | None = None,
    feeds: Mapping[str, Any] | None = None,
    tokens: int = 32,
    providers: Providers | None = None,
    threads: int | None = None,
    rounds: int = 30,
    seconds: float = 10.0,
    strict: bool = False,
    allow_unproven: bool = False,
    progress: MeasureProgress | None = None,
) -> Measurement:
    """Measure whether an adapter, or a blend, is better folded or kept apart, on this package and this device.

    Four ways take turns, call by call: the base, the graph with points without an adapter, with the adapter, and the
    adapter folded. All of them are in memory at once. A decoder is measured writing: a prefill, and steps of one token
    behind it. `graph`: one of the package's graphs (default: all). `feeds`: inputs by name, for one graph (default:
    made from its signature; of a decoder, `tokens` ids). `providers`: as for `onnxruntime.InferenceSession`. `threads`:
    of one operator. `rounds`, `seconds`: each kind of call is timed until one of them is reached. `strict`,
    `allow_unproven`: as for `fold`.

    Raises AdapterError: the adapter cannot be read, does not fit, or can be neither folded nor kept apart.
    PackageError: the package is broken, or has no such graph. FeedError: the inputs do not fit, or no inputs can be
    made. InputError: a number is out of range. RunError: ONNX Runtime failed.
    """
    _check_numbers(tokens, threads, rounds, seconds)
    whole = open_package(package, allow_unproven=allow_unproven)
    if feeds is not None or graph is not None:
        names = [whole.graph(graph).name]
    else:
        names = [info.name for info in whole.manifest.graphs]
    bound = bind_blend(adapter, whole, strict=strict)
    options = Options(providers, None, _make_options(threads))
    copy_options(options.sess_options)  # starts a session: the first of a process takes longer than its graph does
    run = _Run(whole, bound, options, Limits(rounds, seconds), tokens, progress)
    graphs = tuple(run.measure_graph(name, feeds) for name in names)
    run.check_possible()
    advice = advise(
        graphs, why_not_delta=run.why_not_delta, why_not_folded=run.why_not_folded, rounding=run.worst_rounding
    )
    return Measurement(
        package=str(whole.path),
        adapter=bound.name,
        providers=run.providers,
        threads=threads,
        graphs=graphs,
        why_not_delta=run.why_not_delta,
        why_not_folded=run.why_not_folded,
        rounding=run.worst_rounding,
        advice=advice,
    )


class _Run:
    """One measurement, from graph to graph: what is the same for all of them, and what was found on the way."""

    def __init__(
        self,
        package: Package,
        adapter: BoundAdapter,
        options: Options,
        limits: Limits,
        tokens: int,
        progress: MeasureProgress | None,
    ) -> None:
        self._package = package
        self._adapter = adapter
        self._options = options
        self._limits = limits
        self._tokens = tokens
        self._progress = progress
        self._requantize = Requantize()
        self.why_not_delta = _explain_fold_only(adapter)
        self.why_not_folded: str | None = None
        self.providers: tuple[str, ...] = ()

    @property
    def worst_rounding(self) -> float | None:
        """How far folding into quantized weights is from the adapter's change, of the worst module; None of floats."""
        ratios = [rounding.of_change for rounding in self._requantize.rounding.values()]
        return max(ratios, default=None)

    def check_possible(self) -> None:
        """Raises BindError: the adapter runs in neither way."""
        if self.why_not_delta is not None and self.why_not_folded is not None:
            raise BindError(
                f"the adapter {self._adapter.name!r} can neither be folded into this package nor be kept apart",
                problems=[self.why_not_folded, self.why_not_delta],
            )

    def measure_graph(self, name: str, feeds: Mapping[str, Any] | None) -> GraphMeasurement:
        """Start a graph in every way, and time its calls."""
        self._report(f"start {name}", 0, 0)
        sessions, start = self._start(name)
        self.check_possible()
        decoder = None if feeds is not None else self._find_decoder(sessions.points)
        if decoder is not None:
            calls = self._time_text(name, sessions, decoder)
        else:
            calls = (self._time_call(name, sessions, feeds),)
        return GraphMeasurement(
            graph=name,
            calls=calls,
            start_base=start.base,
            start_delta=start.points,
            load=start.load,
            fold=start.fold,
            adapter_bytes=_adapter_bytes(self._adapter, sessions.points.graph),
            folded_bytes=None if sessions.folded is None else folded_bytes(sessions.folded),
            folded_resident_bytes=start.folded_resident_bytes,
        )

    def _start(self, name: str) -> tuple[_Sessions, _Start]:
        info = self._package.graph(name)
        path = self._package.path / info.base_file
        begin = time.perf_counter()
        base = start_session(path, self._options, path=path)
        base_seconds = time.perf_counter() - begin

        begin = time.perf_counter()
        points = AdapterSession(
            self._package,
            graph=name,
            providers=self._options.providers,
            sess_options=self._options.sess_options,
        )
        points_seconds = time.perf_counter() - begin
        self.providers = tuple(points.get_providers())

        load_seconds = None
        if self.why_not_delta is None:
            begin = time.perf_counter()
            points.load_adapter(_NAME, self._adapter)
            load_seconds = time.perf_counter() - begin

        before = _resident_bytes()
        begin = time.perf_counter()
        folded = self._fold(name)
        fold_seconds = None if folded is None else time.perf_counter() - begin
        after = _resident_bytes()
        grown = None if before is None or after is None or folded is None else max(0, after - before)

        sessions = _Sessions(base, points, folded, load_seconds is not None)
        return sessions, _Start(base_seconds, points_seconds, load_seconds, fold_seconds, grown)

    def _fold(self, name: str) -> Any | None:
        """A folded session; None where there can be none, and then `why_not_folded` says why."""
        if self.why_not_folded is not None:
            return None
        try:
            return fold(
                self._package,
                self._adapter,
                graph=name,
                providers=self._options.providers,
                sess_options=self._options.sess_options,
                requantize=self._requantize,
            )
        except (BindError, MissingDependencyError, RunError) as error:
            self.why_not_folded = "; ".join([error.message, *error.problems[:1]])
            return None

    def _find_decoder(self, session: AdapterSession) -> DecoderGraph | None:
        """The graph as a decoder that can write; None where it is none."""
        inputs = {arg.name: arg for arg in session.get_inputs()}
        outputs = {arg.name: arg for arg in session.get_outputs()}
        try:
            settings = Settings.read(self._package.path)
            return DecoderGraph.of(self._package.path / session.graph.file, settings, inputs, outputs)
        except PackageError:
            return None

    def _time_call(self, name: str, sessions: _Sessions, feeds: Mapping[str, Any] | None) -> CallTimes:
        """Single calls, with the same inputs for all."""
        given = feeds
        if given is None:
            given = make_feeds(sessions.base.get_inputs(), Sizes.of(self._package, self._tokens))
        inputs: Mapping[str, Any] = given

        def run_plain(session: Any) -> Contender:
            return Contender(lambda: session.run(None, inputs))

        contenders = {
            "base": run_plain(sessions.base),
            "without": Contender(lambda: sessions.points.run(None, inputs)),
        }
        if sessions.has_delta:
            contenders["delta"] = Contender(lambda: sessions.points.run(None, inputs, adapter=_NAME))
        if sessions.folded is not None:
            contenders["folded"] = run_plain(sessions.folded)
        try:
            # Our own session first: it says what is wrong with inputs.
            contenders["without"].run()
        except (FeedError, RunError) as error:
            if feeds is not None:
                raise
            raise FeedError(
                "the graph does not run with inputs made from its signature; give your own "
                f"(`feeds=...`): {error.message}",
                problems=error.problems,
            ) from error
        return self._time("one call", name, contenders)

    def _time_text(self, name: str, sessions: _Sessions, decoder: DecoderGraph) -> tuple[CallTimes, ...]:
        """A prompt, and steps of one token behind it."""
        settings = Settings.read(self._package.path)
        length = self._tokens
        if settings.context is not None:
            length = min(length, max(1, settings.context // 2))
        new = _NEW_TOKENS if settings.context is None else min(_NEW_TOKENS, settings.context - length)
        vocabulary = decoder.vocabulary or Sizes.of(self._package, length).vocabulary
        prompt = np.random.default_rng(1).integers(0, vocabulary, length).tolist()
        leases = {
            "base": Lease.of(sessions.base, ((),), {}),
            "without": sessions.points.lease(None, 1),
        }
        if sessions.has_delta:
            leases["delta"] = sessions.points.lease(_NAME, 1)
        if sessions.folded is not None:
            leases["folded"] = Lease.of(sessions.folded, ((),), {})
        texts = {key: _Text(decoder, lease, prompt, max(1, new)) for key, lease in leases.items()}
        prefills = {key: Contender(text.feed_prompt, text.begin) for key, text in texts.items()}
        steps = {key: Contender(text.feed_token, text.make_room) for key, text in texts.items()}
        return (
            self._time(f"prefill of {length} tokens", name, prefills),
            self._time("one token", name, steps),
        )

    def _time(self, call: str, graph: str, contenders: Mapping[str, Contender]) -> CallTimes:
        with fail_in_run():
            timing = take_turns(
                contenders, self._limits, lambda done, total: self._report(f"{graph}: {call}", done, total)
            )
        return CallTimes(
            call=call,
            base=timing.seconds["base"],
            without_adapter=timing.seconds["without"],
            delta=timing.seconds.get("delta"),
            folded=timing.seconds.get("folded"),
            rounds=timing.rounds,
        )

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


class _Text:
    """One text that is written on and on, and begun anew when its room is used up."""

    def __init__(self, graph: DecoderGraph, lease: Lease, prompt: list[int], room: int) -> None:
        self._graph = graph
        self._lease = lease
        self._prompt = prompt
        self._room = room
        self._left = 0
        self._decoder: Decoder | None = None

    def begin(self) -> None:
        """An empty cache, bound."""
        memory = make_memory(self._graph, Device.of(self._lease.session), rows=1)
        memory.reserve(len(self._prompt) + self._room)
        self._decoder = Decoder(self._graph, self._lease, memory)

    def feed_prompt(self) -> Array:
        """Logits behind the prompt."""
        assert self._decoder is not None
        self._left = self._room
        return self._decoder.feed([self._prompt])

    def make_room(self) -> None:
        """Begin anew where no further token fits."""
        if self._decoder is None or not self._left:
            self.begin()
            self.feed_prompt()

    def feed_token(self) -> Array:
        """Logits behind one more token; always the same one, which takes as long as any."""
        assert self._decoder is not None
        self._left -= 1
        return self._decoder.feed([self._prompt[-1:]])


def _check_numbers(tokens: int, threads: int | None, rounds: int, seconds: float) -> None:
    problems: list[str] = []
    numbers = {"tokens": (tokens, 10**6), "rounds": (rounds, 10**6)}
    if threads is not None:
        numbers["threads"] = (threads, _MOST_THREADS)
    for name, (value, most) in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            problems.append(f"{name} must be a whole number from 1 to {most:,}")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 10**6:
        problems.append("seconds must be a number above 0, and below 1,000,000")
    if problems:
        raise InputError("a number of the measurement is out of range", problems=problems)


def _make_options(threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _explain_fold_only(adapter: BoundAdapter) -> str | None:
    """Why an adapter cannot be kept apart from its package, or None."""
    only = adapter.coverage.fold_only
    if not only:
        return None
    module, reason = next(iter(only.items()))
    more = f", and {len(only) - 1} modules more" if len(only) > 1 else ""
    return f"{module}: {reason}{more}"


def _adapter_bytes(adapter: BoundAdapter, graph: GraphInfo) -> int:
    """What an adapter keeps on the device for one graph."""
    names = {weight.name for weight in graph.replaceable}
    for point in graph.points:
        names |= {point.lora_a, point.lora_b, point.dora_scale}
    return sum(tensor.nbytes for name, tensor in adapter.tensors.items() if name in names)


def _resident_bytes() -> int | None:
    """What the process has in memory; None where the system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * mmap.PAGESIZE
