"""The costs of the main job on a 135M Llama: exporting, attaching, folding, switching, and the delta itself.

Regime: float32, 2 threads, batch 1; decode is one token on a cache of 128, prefill is 128 tokens at
once. Every ratio compares calls that took turns in one process on the same weights; seconds are
this machine's and do not carry over, ratios do. The package's base graph is the baseline: the
exporter's own graph, without points.

    python -m benchmarks.run [--work FOLDER]        prints JSON and writes results/main.json
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort

from benchmarks.subject import Q_AND_V, make_adapter, make_checkpoint
from benchmarks.timing import in_turns, machine, peak_memory, run_child
from onnx_lora import AdapterSession, Package, fold

Feeds = dict[str, np.ndarray[Any, Any]]

_THREADS = 2
_CONTEXT = 128  # tokens
_TURNS = {"decode": 60, "prefill": 30, "start": 4, "switch": 100}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), help="Keep models here, and use those that are there.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "main.json")
def main(work: Path | None, out: Path) -> None:
    """Measure, print, and write the results."""
    with tempfile.TemporaryDirectory(prefix="onnx-lora-bench.") as scratch:
        results = measure(work or Path(scratch))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    click.echo(json.dumps(results, indent=1))


def measure(work: Path) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint(work / "checkpoint")
    everything = [make_adapter(checkpoint, work / f"all{seed}", "all-linear", seed=seed) for seed in (1, 2)]
    few = make_adapter(checkpoint, work / "qv", Q_AND_V, seed=3)
    results: dict[str, Any] = {"machine": machine(_THREADS), "making": _making(work, checkpoint)}
    package = Package.open(work / "package")
    results["starting"] = _starting(package, everything[0])
    results |= _running(package, everything, few)
    return results


def _making(work: Path, checkpoint: Path) -> dict[str, Any]:
    """Optimum alone, our export (which contains it), and attaching to the base graph with external data."""
    for name in ("package", "optimum", "attached"):
        shutil.rmtree(work / name, ignore_errors=True)
    facts: dict[str, Any] = {"optimum alone": run_child("optimum", checkpoint, work / "optimum")}
    facts["export"] = run_child("export", checkpoint, work / "package")
    source = work / "base-only"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for name in ("base.onnx", "model.onnx.data"):
        shutil.copyfile(work / "package" / name, source / name)
    facts["attach"] = run_child("attach", source / "base.onnx", work / "attached")
    facts["weights_mb"] = (source / "model.onnx.data").stat().st_size / 1e6
    facts["export / optimum alone, seconds"] = facts["export"]["seconds"] / facts["optimum alone"]["seconds"]
    shutil.rmtree(work / "optimum")
    shutil.rmtree(source)
    return facts


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = _THREADS
    options.log_severity_level = 3
    return options


def _starting(package: Package, adapter: Path) -> dict[str, Any]:
    """Until a session answers: plain, folded, with points and an adapter loaded."""

    def with_points(_: int) -> None:
        AdapterSession(package, sess_options=_options()).load_adapter("it", adapter)

    seconds = in_turns(
        {
            "plain session": lambda _: ort.InferenceSession(str(package.path / "base.onnx"), _options()),
            "fold": lambda _: fold(package, adapter, sess_options=_options()),
            "session with points, adapter loaded": with_points,
        },
        turns=_TURNS["start"],
        warm_up=1,
    )
    return {
        "seconds": seconds,
        "fold / plain session": seconds["fold"] / seconds["plain session"],
        "fold memory": peak_memory(lambda: fold(package, adapter, sess_options=_options())),
    }


def _feeds(tokens: int, past: int) -> Feeds:
    generator = np.random.default_rng(0)
    feeds: Feeds = {
        "input_ids": generator.integers(0, 49152, (1, tokens)),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": np.arange(past, past + tokens)[None],
    }
    for layer in range(30):
        for kind in ("key", "value"):
            cache = generator.standard_normal((1, 3, past, 64)).astype(np.float32)
            feeds[f"past_key_values.{layer}.{kind}"] = cache
    return feeds


def _running(package: Package, everything: list[Path], few: Path) -> dict[str, Any]:
    base = ort.InferenceSession(str(package.path / "base.onnx"), _options())
    session = AdapterSession(package, sess_options=_options())
    start = time.perf_counter()
    session.load_adapter("first", everything[0])
    loading = time.perf_counter() - start
    session.load_adapter("second", everything[1])
    session.load_adapter("q/v", few)
    session.load_adapter("q/v again", few)
    folded = fold(package, everything[0], sess_options=_options())
    results: dict[str, Any] = {"loading an adapter, seconds": loading}
    for name, feeds in {"decode": _feeds(1, _CONTEXT), "prefill": _feeds(_CONTEXT, 0)}.items():
        calls = {
            "without points": _call(base, feeds),
            "no adapter": _call(session, feeds, None),
            "r=16 on all": _call(session, feeds, "first"),
            "r=16 on all, switching every call": _call(session, feeds, "first", "second"),
            "r=16 on q/v": _call(session, feeds, "q/v"),
            "folded": _call(folded, feeds),
        }
        seconds = in_turns(calls, turns=_TURNS[name])
        plain = seconds["without points"]
        results[name] = {
            "milliseconds": {kind: 1000 * value for kind, value in seconds.items()},
            "ratio": {kind: value / plain for kind, value in seconds.items()},
        }
    results["switching, milliseconds"] = _switching(session)
    tensors = session.adapters["first"].tensors
    results["adapter bytes / base bytes"] = (
        sum(value.nbytes for value in tensors.values()) / (package.path / "model.onnx.data").stat().st_size
    )
    return results


def _call(session: Any, feeds: Feeds, *adapters: str | None) -> Callable[[int], object]:
    """Run `session`, with the adapters in turn if there are any."""
    if not adapters:
        return lambda _: session.run(None, feeds)
    return lambda turn: session.run(None, feeds, adapter=adapters[turn % len(adapters)])


def _switching(session: AdapterSession) -> dict[str, float]:
    """What a switch costs: the shortest call there is, one token on an empty cache, with the same adapter
    again and with another one."""
    feeds = _feeds(1, 0)
    seconds = in_turns(
        {"same": _call(session, feeds, "q/v"), "other": _call(session, feeds, "q/v", "q/v again")},
        turns=_TURNS["switch"],
    )
    milliseconds = {name: 1000 * value for name, value in seconds.items()}
    return milliseconds | {"difference": milliseconds["other"] - milliseconds["same"]}


if __name__ == "__main__":
    main()
