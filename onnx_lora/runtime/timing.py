"""Calls that take turns, and how long each of them takes. It knows neither graphs nor adapters."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Contender", "Limits", "Timing", "take_turns"]

# Rounds before the first that counts.
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """When a comparison ends: after so many rounds, or so many seconds, whichever comes first; after one round at
    least."""

    rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the calls that are compared. `prepare` is called before each, and is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None

    def time(self) -> float:
        """Seconds of one call. Before it is timed it is made once: the threads of the session that ran before spin on
        for a while, and would slow it by half."""
        for _ in range(2):
            if self.prepare is not None:
                self.prepare()
            start = time.perf_counter()
            self.run()
        return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds by contender."""

    seconds: Mapping[str, float]
    rounds: int


def take_turns(contenders: Mapping[str, Contender], limits: Limits, progress: Callable[[int, int], object]) -> Timing:
    """Time every contender once a round, so that a slow moment of the machine hits all of them.

    `progress` is called with the rounds done, and how many there are at most.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + limits.seconds
    warm_up = _WARM_UP
    done = 0
    while done < limits.rounds:
        is_late = time.perf_counter() > end
        if is_late and done:
            break
        counts = warm_up == 0 or is_late
        for name, contender in contenders.items():
            taken = contender.time()
            if counts:
                seconds[name].append(taken)
        if counts:
            done += 1
            progress(done, limits.rounds)
        else:
            warm_up -= 1
    return Timing({name: statistics.median(taken) for name, taken in seconds.items()}, done)
