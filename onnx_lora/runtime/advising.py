"""Fold or delta, in words: the rule, and the sentences with the numbers. It knows what was measured, and measures
nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_lora.runtime.measurement import Advice, GraphMeasurement

__all__ = ["WORTH", "advise"]

# Of a call's time: what a model of its own for one adapter is worth. Smaller differences are a machine's own from day
# to day.
WORTH = 0.05


# Below it a median is what the machine did at that moment.
_FEW_ROUNDS = 5


def advise(
    graphs: Sequence[GraphMeasurement], *, why_not_delta: str | None, why_not_folded: str | None, rounding: float | None
) -> Advice:
    """What follows from the times of all graphs. One of the two reasons at most is given."""
    advice = _decide(graphs, why_not_delta, why_not_folded, rounding)
    fewest = min((graph.calls[-1].rounds for graph in graphs), default=_FEW_ROUNDS)
    if fewest >= _FEW_ROUNDS:
        return advice
    times = "once" if fewest == 1 else f"{fewest} times"
    caveat = f"Each call was timed {times} only: measure longer before you decide (rounds, seconds)."
    return replace(advice, reasons=(*advice.reasons, caveat))


def _decide(
    graphs: Sequence[GraphMeasurement], why_not_delta: str | None, why_not_folded: str | None, rounding: float | None
) -> Advice:
    if why_not_delta is not None:
        reasons = [f"Fold: this adapter can only be folded ({why_not_delta})."]
        reasons.append(f"Where adapters switch, each switch is a fold, which took {_seconds(_fold_seconds(graphs))}.")
        return Advice("fold", "fold", tuple(reasons))
    points = _cost_of_points(graphs)
    if why_not_folded is not None:
        return Advice("delta", "delta", (f"Delta: this adapter is not folded here ({why_not_folded}).", points))
    apart, folded = _last_call(graphs)
    overhead = apart / folded - 1
    compared = f"a call takes {_seconds(apart)} with the adapter apart and {_seconds(folded)} folded, {_more(overhead)}"
    switching = (
        f"Delta if adapters switch: the next call takes another one at no cost, and each keeps "
        f"{_size(sum(graph.adapter_bytes for graph in graphs))}; a fold took {_seconds(_fold_seconds(graphs))}, and "
        f"each folded session keeps {_size(sum(graph.folded_bytes or 0 for graph in graphs))} of weights of its own."
    )
    if rounding is not None:
        exact = (
            "Delta: the base is quantized, and folding rounds its weights again; the change that arrives differs from "
            f"the adapter's own by up to {rounding:.0%}, and kept apart it is exact."
        )
        if overhead < WORTH:
            price = f"And it costs nothing: {compared}."
        else:
            price = f"Exactness has its price: {compared}. Fold only if that counts more."
        return Advice("delta", "delta", (exact, price, switching, points))
    if overhead < WORTH:
        fixed = f"Delta even if the adapter never changes: {compared}, and below {WORTH:.0%} folding is not worth it."
        return Advice("delta", "delta", (fixed, switching, points))
    won_back = _fold_seconds(graphs) / (apart - folded)
    fixed = f"Fold if the adapter never changes: {compared}; after {won_back:,.0f} calls the fold has paid for itself."
    return Advice("fold", "delta", (fixed, switching, points))


def _last_call(graphs: Sequence[GraphMeasurement]) -> tuple[float, float]:
    """Seconds of the calls that are made most often, of all graphs together: apart, and folded."""
    apart = sum(graph.calls[-1].delta or 0.0 for graph in graphs)
    folded = sum(graph.calls[-1].folded or 0.0 for graph in graphs)
    return apart, folded


def _cost_of_points(graphs: Sequence[GraphMeasurement]) -> str:
    base = sum(graph.calls[-1].base for graph in graphs)
    without = sum(graph.calls[-1].without_adapter for graph in graphs)
    return (
        f"Calls without an adapter take {_seconds(without)} on the graph with points, and {_seconds(base)} on the one "
        f"without ({_more(without / base - 1)})."
    )


def _fold_seconds(graphs: Sequence[GraphMeasurement]) -> float:
    return sum(graph.fold or 0.0 for graph in graphs)


def _more(overhead: float) -> str:
    """How much longer a call takes: in percent, or, where that is no number to read, by how many times."""
    return f"{overhead:+.1%}" if overhead < 9 else f"{overhead + 1:.0f} times as long"


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
