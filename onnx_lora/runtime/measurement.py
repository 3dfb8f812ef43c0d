"""What `measure` finds out, as data: times of calls, what starting cost, and the advice that follows. It measures
nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Advice", "CallTimes", "GraphMeasurement", "Measurement", "Way"]

# How an adapter runs: in the weights, or apart from them.
Way = Literal["fold", "delta"]


@dataclass(frozen=True, slots=True)
class CallTimes:
    """One kind of call, in median seconds."""

    call: str
    """What was called."""

    base: float
    """Seconds of the graph without points."""

    without_adapter: float
    """Seconds of the graph with points, and no adapter in the call."""

    delta: float | None
    """Seconds with the adapter kept apart; None where it can only be folded."""

    folded: float | None
    """Seconds with the adapter in the weights; None where it cannot be folded."""

    rounds: int
    """How often each was timed."""


@dataclass(frozen=True, slots=True)
class GraphMeasurement:
    """One graph of the package."""

    graph: str
    """Its name."""

    calls: tuple[CallTimes, ...]
    """Of a decoder a prefill and a decode step, of other graphs one call. The last is the one that a service makes most
    often."""

    start_base: float
    """Seconds to start a session without points."""

    start_delta: float
    """Seconds to start a session with points."""

    load: float | None
    """Seconds to read, check and bind the adapter, and to put it on the device; None where it can only be folded."""

    fold: float | None
    """Seconds to fold it and to start a session; None where it cannot be folded."""

    adapter_bytes: int
    """What the adapter keeps on the device."""

    folded_bytes: int | None
    """The weights that a folded session keeps beside the base's file."""

    folded_resident_bytes: int | None
    """How much the process grew as the folded session started, in bytes; None where the system does not say."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Which way is better."""

    fixed: Way
    """What to do where the adapter never changes."""

    switching: Way
    """What to do where adapters change."""

    reasons: tuple[str, ...]
    """Why, in words, with the numbers."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """An adapter on a package, measured on one device."""

    package: str
    """The package's folder."""

    adapter: str
    """The adapter's name."""

    providers: tuple[str, ...]
    """The execution providers that were asked for; empty for the default."""

    threads: int | None
    """Threads of one operator; None for ONNX Runtime's own number."""

    graphs: tuple[GraphMeasurement, ...]
    """What was measured, by graph."""

    why_not_delta: str | None
    """Why the adapter does not run apart from the weights; None: it does."""

    why_not_folded: str | None
    """Why it cannot be folded; None: it can."""

    rounding: float | None
    """The base is quantized, and folding rounds it again: how far the change that arrived is from the adapter's own, as
    a ratio, of the worst module; None of float weights."""

    advice: Advice
    """What follows."""
