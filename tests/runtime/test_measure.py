"""Fold or delta, measured: what is timed, what is said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from onnx_lora import measure
from onnx_lora.errors import BindError, FeedError, InputError, PackageError
from onnx_lora.package import Package
from onnx_lora.runtime.advising import advise
from onnx_lora.runtime.made_feeds import Sizes, make_feeds
from onnx_lora.runtime.measurement import CallTimes, GraphMeasurement
from onnx_lora.runtime.timing import Contender, Limits, take_turns
from tests.runtime import tiny

A = tiny.adapter("a", 1)
QUANTIZED = Path(__file__).parent.parent / "golden" / "format-5" / "quantized"
FEW: dict[str, Any] = {"rounds": 2, "seconds": 20, "threads": 1, "providers": ["CPUExecutionProvider"]}


def test_all_four_ways_are_timed(package: Package) -> None:
    result = measure(package, A, **FEW)
    (graph,) = result.graphs
    (call,) = graph.calls
    assert call.rounds == 2
    for seconds in (call.base, call.without_adapter, call.delta, call.folded, graph.fold, graph.load):
        assert seconds is not None
        assert 0 < seconds < 60
    assert graph.adapter_bytes == sum(tensor.nbytes for tensor in A.tensors.values())
    assert graph.folded_bytes == tiny.weights()["W_qk"].nbytes + tiny.weights()["W_up"].nbytes
    assert result.why_not_delta is None
    assert result.why_not_folded is None
    assert result.rounding is None
    assert result.providers == ("CPUExecutionProvider",)


def test_the_callers_feeds_are_what_runs(package: Package) -> None:
    feeds = {"x": np.zeros((3, 5, tiny.IN), np.float32), "mask": np.ones((3, 5), np.int64)}
    assert measure(package, A, feeds=feeds, **FEW).graphs[0].calls[0].call == "one call"
    with pytest.raises(FeedError, match="mask is missing"):
        measure(package, A, feeds={"x": feeds["x"]}, **FEW)


def test_progress_is_told_and_may_end_it(package: Package) -> None:
    told: list[tuple[str, int, int]] = []
    measure(package, A, progress=lambda *step: told.append(step), **FEW)
    assert told[0][0] == "start tiny"
    assert told[-1] == ("tiny: one call", 2, 2)

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(package, A, progress=interrupt, **FEW)


def test_every_graph_is_measured_or_the_one_that_is_named(tmp_path: Any) -> None:
    package = tiny.make_package(tmp_path / "two", graphs=("one", "two"))
    assert [graph.graph for graph in measure(package, A, **FEW).graphs] == ["one", "two"]
    assert [graph.graph for graph in measure(package, A, graph="two", **FEW).graphs] == ["two"]
    with pytest.raises(PackageError, match="a graph must be named"):
        measure(package, A, feeds={}, **FEW)


def test_a_blend_is_measured_as_one_adapter(package: Package) -> None:
    result = measure(package, [(A, 0.5), (tiny.adapter("b", 2), 0.5)], **FEW)
    assert result.adapter == "blend"


def only_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_lora.runtime.measuring._explain_fold_only", lambda _: "layer.q: it only folds")


def test_an_adapter_that_only_folds_says_so(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    only_folds(monkeypatch)
    result = measure(package, A, **FEW)
    assert result.graphs[0].calls[0].delta is None
    assert result.graphs[0].load is None
    assert result.advice.fixed == result.advice.switching == "fold"
    assert "layer.q: it only folds" in result.advice.reasons[0]


def test_what_cannot_be_folded_is_measured_apart(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise BindError("layer.q: it cannot be folded")

    monkeypatch.setattr("onnx_lora.runtime.measuring.fold", refuse)
    result = measure(package, A, **FEW)
    assert result.why_not_folded == "layer.q: it cannot be folded"
    assert result.graphs[0].calls[0].folded is None
    assert result.advice.fixed == result.advice.switching == "delta"
    only_folds(monkeypatch)
    with pytest.raises(BindError, match="can neither be folded into this package nor be kept apart"):
        measure(package, A, **FEW)


def test_folding_into_quantized_weights_is_measured_with_its_rounding() -> None:
    """A package with MatMulNBits in 4 bits and DequantizeLinear in 8, whose weights a fold rounds again."""
    result = measure(QUANTIZED / "package", QUANTIZED / "lora", allow_unproven=True, **FEW)
    assert result.why_not_delta is None
    assert result.why_not_folded is None
    (graph,) = result.graphs
    (call,) = graph.calls
    for seconds in (call.base, call.without_adapter, call.delta, call.folded, graph.fold, graph.load):
        assert seconds is not None
        assert 0 < seconds < 60
    assert result.rounding is not None
    assert 0 < result.rounding < 1
    assert graph.folded_bytes
    assert (result.advice.fixed, result.advice.switching) == ("delta", "delta")
    assert "folding rounds its weights again" in result.advice.reasons[0]
    assert f"{result.rounding:.0%}" in result.advice.reasons[0]


@pytest.mark.parametrize(
    "name, value",
    [("rounds", 0), ("seconds", 0), ("seconds", float("nan")), ("tokens", -1), ("threads", 0), ("threads", 1025)],
)
def test_numbers_out_of_range_are_refused(package: Package, name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} must be"):
        measure(package, A, **FEW | {name: value})


# --- the advice -----------------------------------------------------------------------------------


def graph_with(delta: float | None, folded: float | None, rounds: int = 30) -> GraphMeasurement:
    call = CallTimes("one call", 0.010, 0.0101, delta, folded, rounds)
    return GraphMeasurement("model", (call,), 1.0, 1.1, 0.05, 2.0, 10**6, 10**8, None)


def advice_of(delta: float | None, folded: float | None, **found: Any) -> Any:
    return advise(
        [graph_with(delta, folded)], **{"why_not_delta": None, "why_not_folded": None, "rounding": None} | found
    )


def test_a_large_overhead_is_worth_a_fold_where_the_adapter_never_changes() -> None:
    advice = advice_of(0.012, 0.010)
    assert (advice.fixed, advice.switching) == ("fold", "delta")
    assert "12 ms with the adapter apart and 10 ms folded, +20.0%" in advice.reasons[0]
    assert "after 1,000 calls" in advice.reasons[0]
    assert "a fold took 2 s" in advice.reasons[1]


@pytest.mark.parametrize("delta", [0.0104, 0.0100, 0.0095])
def test_a_small_overhead_is_not(delta: float) -> None:
    advice = advice_of(delta, 0.010)
    assert (advice.fixed, advice.switching) == ("delta", "delta")
    assert "below 5% folding is not worth it" in advice.reasons[0]


def test_few_rounds_are_said_and_many_times_are_no_percentage() -> None:
    graph = graph_with(1.0, 0.010, rounds=2)
    advice = advise([graph], why_not_delta=None, why_not_folded=None, rounding=None)
    assert "100 times as long" in advice.reasons[0]
    assert "timed 2 times only" in advice.reasons[-1]
    assert not any("only: measure longer" in reason for reason in advice_of(1.0, 0.010).reasons)


def test_of_a_quantized_base_exactness_counts_first() -> None:
    advice = advice_of(0.020, 0.010, rounding=0.31)
    assert (advice.fixed, advice.switching) == ("delta", "delta")
    assert "rounds its weights again" in advice.reasons[0]
    assert "31%" in advice.reasons[0]
    assert "+100.0%" in advice.reasons[1]


def test_exactness_that_costs_nothing_has_no_price() -> None:
    """Folding into a quantized base is often the slower way."""
    advice = advice_of(0.010, 0.020, rounding=0.31)
    assert (advice.fixed, advice.switching) == ("delta", "delta")
    assert advice.reasons[1].startswith(
        "And it costs nothing: a call takes 10 ms with the adapter apart and 20 ms folded"
    )


# --- timing ---------------------------------------------------------------------------------------


def test_contenders_take_turns_and_are_called_twice_a_round() -> None:
    calls: list[str] = []
    contenders = {
        "a": Contender(lambda: calls.append("a")),
        "b": Contender(lambda: calls.append("b"), lambda: calls.append("b is prepared")),
    }
    timing = take_turns(contenders, Limits(3, 60), lambda *_: None)
    once = ["a", "a", "b is prepared", "b", "b is prepared", "b"]
    assert calls == once * 5  # two rounds warm up
    assert timing.rounds == 3
    assert set(timing.seconds) == {"a", "b"}


def test_time_ends_a_comparison_after_one_round_at_least() -> None:
    timing = take_turns({"a": Contender(lambda: None)}, Limits(10**6, 1e-9), lambda *_: None)
    assert timing.rounds == 1


# --- inputs that are made up ----------------------------------------------------------------------


class Arg(NamedTuple):
    name: str
    type: str
    shape: list[int | str | None]


def test_ids_lie_in_the_vocabulary_masks_are_ones_and_the_cache_is_empty() -> None:
    inputs = [
        Arg("input_ids", "tensor(int64)", ["batch", "sequence"]),
        Arg("attention_mask", "tensor(int64)", ["batch", "past_sequence + 1"]),
        Arg("position_ids", "tensor(int64)", ["batch", "sequence"]),
        Arg("token_type_ids", "tensor(int64)", ["batch", "sequence"]),
        Arg("past_key_values.0.key", "tensor(float16)", ["batch", 2, "past_sequence", 8]),
        Arg("pixel_values", "tensor(float)", ["batch", "num_channels", "height", "width"]),
        Arg("timestep", "tensor(int64)", []),
    ]
    feeds = make_feeds(inputs, Sizes(tokens=5, vocabulary=7, image=16))
    assert {name: value.shape for name, value in feeds.items()} == {
        "input_ids": (1, 5),
        "attention_mask": (1, 5),
        "position_ids": (1, 5),
        "token_type_ids": (1, 5),
        "past_key_values.0.key": (1, 2, 0, 8),
        "pixel_values": (1, 3, 16, 16),
        "timestep": (),
    }
    assert set(feeds["input_ids"].ravel().tolist()) <= set(range(7))
    assert feeds["attention_mask"].all()
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert not feeds["token_type_ids"].any()
    assert feeds["past_key_values.0.key"].dtype == np.float16


def test_inputs_of_a_type_that_numpy_has_not_are_refused() -> None:
    with pytest.raises(FeedError, match=r"texts is tensor\(string\)"):
        make_feeds([Arg("texts", "tensor(string)", ["batch"])], Sizes(tokens=5))
