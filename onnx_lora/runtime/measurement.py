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
    """One kind of call, in median seconds.

    base: the graph without points. `without_adapter`: the graph with points, and no adapter in this call. `delta`: the
    adapter kept apart; None where it can only be folded. `folded`: the adapter in the weights; None where it cannot be
    folded. `rounds`: how often each was timed.
    """

    call: str
    base: float
    without_adapter: float
    delta: float | None
    folded: float | None
    rounds: int


@dataclass(frozen=True, slots=True)
class GraphMeasurement:
    """One graph of the package.

    calls: of a decoder a prefill and a decode step, of other graphs one call. The last is the one that a service makes
        most often.
    start_base, start_delta: seconds to start a session without points, and one with. `load`: seconds to read, check
        and bind the adapter, and to put it on the device. `fold`: seconds to fold it and to start a session; None
        where it cannot be folded.
    adapter_bytes: what the adapter keeps on the device. `folded_bytes`: the weights that a folded session keeps beside
        the base's file. `folded_resident`: how much the process grew as the folded session started, in bytes; None
        where the system does not say.
    """

    graph: str
    calls: tuple[CallTimes, ...]
    start_base: float
    start_delta: float
    load: float | None
    fold: float | None
    adapter_bytes: int
    folded_bytes: int | None
    folded_resident: int | None


@dataclass(frozen=True, slots=True)
class Advice:
    """`fixed`: what to do where the adapter never changes, `switching`: where adapters do. `reasons`: in words, with
    the numbers."""

    fixed: Way
    switching: Way
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """An adapter on a package, measured on one device.

    why_not_delta, why_not_folded: why the adapter does not run that way here, or None. `rounding`: the base is
    quantized, and folding rounds it again: how far the change that arrived is from the adapter's own, as a ratio, of
    the worst module; None of float weights.
    """

    package: str
    adapter: str
    providers: tuple[str, ...]
    threads: int | None
    graphs: tuple[GraphMeasurement, ...]
    why_not_delta: str | None
    why_not_folded: str | None
    rounding: float | None
    advice: Advice
