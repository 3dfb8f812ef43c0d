"""Generating: milliseconds a token on a 135M Llama, against GenAI's own loop, PEFT in PyTorch, and llama.cpp.

Regime: 2 threads; a prompt of 128 tokens, then up to 64 new ones, greedily; fp32, and int4 in blocks of 32 with int8
arithmetic. All contenders of a precision live in one process and take turns in an order that changes, so that a slow
moment of the machine hits all of them; what is compared is compared within a turn, and of the turns the median counts.
Threads of the session before spin on for a while: a short text and five tokens come before anything is timed, and
tokens are timed in blocks of twenty. PyTorch computes in float32 at both precisions. The baseline is the exporter's
graph without points in our own loop; it is also what calls without an adapter would cost through a second session.
llama.cpp runs the same weights in f32 and in Q4_0 where llama_cpp and gguf can be imported; without them the results
say so.

    python -m benchmarks.decode [--out FILE] [--quick] [--turns N] [--work FOLDER]
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import (
    Contender,
    GenAI,
    LlamaCpp,
    Ours,
    OursByCall,
    Torch,
    genai_model,
    opened,
    without_points,
)
from benchmarks.gguf_files import TYPES, missing, write_adapter, write_model
from benchmarks.subject import Q_AND_V, make_adapter, make_checkpoint, make_tokenizer
from benchmarks.timing import machine
from onnx_lora import Package, bind, read_adapter, write_bound

_THREADS = 2
_PROMPT, _NEW = 128, 64  # tokens
_SHORT = 16  # tokens of the text that wakes a contender's threads
_UNTIMED, _BLOCK, _BLOCKS = 5, 20, 2  # tokens, tokens, blocks in a turn
_TURNS, _QUICK_TURNS = 10, 2
_ROWS = 8
_PRECISIONS = ("fp32", "int4")

# The contenders that goals are about.
_PLAIN = "graph without points"
_NONE = "with points, no adapter"
_ALL = "r=16 on all seven"
_CALLS = "r=16 on all seven, a call for each token"
_SWITCH = "the same, another adapter each token"
_ROWS_ONE = f"{_ROWS} rows, one adapter"
_ROWS_OWN = f"{_ROWS} rows, {_ROWS} adapters"
_GENAI_BASE, _GENAI_ALL = "GenAI: builder's graph", "GenAI: package, r=16 on all seven"
_PEFT_ALL = "PEFT (fp32): r=16 on all seven"
_LLAMA_ALL = "llama.cpp: r=16 on all seven"


@dataclass(frozen=True)
class Turn:
    """One contender's turn."""

    prefill: float  # seconds, of the whole prompt and the first token
    token: float  # seconds, the median of its blocks


@dataclass(frozen=True)
class Goal:
    name: str
    value: float
    limit: float
    holds: bool


@click.command()
@click.option("--work", type=click.Path(path_type=Path), help="Keep models here, and use those that are there.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "decode.json")
@click.option("--turns", type=click.IntRange(1), default=_TURNS, show_default=True)
@click.option("--quick", is_flag=True, help=f"{_QUICK_TURNS} turns: whether it runs, not what it costs.")
def main(work: Path | None, out: Path, turns: int, quick: bool) -> None:
    """Measure, print, and write the results."""
    with tempfile.TemporaryDirectory(prefix="onnx-lora-bench.") as scratch:
        results = measure(work or Path(scratch), _QUICK_TURNS if quick else turns)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def measure(work: Path, turns: int) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = make_tokenizer(make_checkpoint(work / "checkpoint"))
    everything = [
        make_adapter(checkpoint, work / f"all{seed}", "all-linear", seed=seed) for seed in range(1, _ROWS + 1)
    ]
    few = make_adapter(checkpoint, work / "qv", Q_AND_V, seed=20)
    results: dict[str, Any] = {
        "machine": machine(_THREADS),
        "regime": {"prompt": _PROMPT, "new": _NEW, "block": _BLOCK, "turns": turns},
        "llama.cpp": f"not installed: {', '.join(missing())}" if missing() else "measured",
    }
    console = Console(stderr=True)
    console.print(f"llama.cpp: {results['llama.cpp']}")
    for precision in _PRECISIONS:
        package = _package(checkpoint, work / precision, precision)
        contenders = _contenders(work, package, checkpoint, everything, few)
        if not missing():
            contenders |= _llama(work, precision, checkpoint, everything[0])
        taken = _take_turns(contenders, turns, console)
        del contenders
        gc.collect()
        results[precision] = _facts(taken, precision, _sizes(package, everything[0]))
        _show(console, precision, results[precision])
    return results


def _package(checkpoint: Path, folder: Path, precision: str) -> Package:
    from onnx_lora.exporter import export

    if folder.exists():
        return Package.open(folder)
    return export(checkpoint, folder, via="genai", precision=precision, verify=False)


def _contenders(
    work: Path, package: Package, checkpoint: Path, everything: Sequence[Path], few: Path
) -> dict[str, Contender]:
    ours = opened(package, _THREADS)
    names = [f"all{index}" for index in range(len(everything))]
    for name, folder in zip(names, everything, strict=True):
        ours.load_adapter(name, folder)
    ours.load_adapter("qv", few)
    converted = work / f"{package.name}.onnx_adapter"
    if not converted.exists():
        write_bound(bind(read_adapter(everything[0]), package), converted, format="onnx_adapter")
    graph = package.graph()
    theirs = genai_model(package.path, graph.file, _THREADS)
    return {
        _PLAIN: Ours(opened(without_points(package), _THREADS)),
        _NONE: Ours(ours),
        "r=16 on q and v": Ours(ours, "qv"),
        _ALL: Ours(ours, names[0]),
        _CALLS: OursByCall(ours, names[:1]),
        _SWITCH: OursByCall(ours, names[:2]),
        _ROWS_ONE: Ours(ours, [names[0]] * _ROWS),
        _ROWS_OWN: Ours(ours, names),
        _GENAI_BASE: GenAI(genai_model(package.path, graph.base_file, _THREADS)),
        "GenAI: package, no adapter": GenAI(theirs),
        _GENAI_ALL: GenAI(theirs, converted),
        "PEFT (fp32): base": Torch(checkpoint, None, _THREADS),
        _PEFT_ALL: Torch(checkpoint, everything[0], _THREADS),
    }


def _llama(work: Path, precision: str, checkpoint: Path, adapter: Path) -> dict[str, Contender]:
    model = write_model(checkpoint, work / f"{precision}.gguf", TYPES[precision])
    factors = write_adapter(adapter, checkpoint, work / f"{adapter.name}.gguf")
    return {
        "llama.cpp: base": LlamaCpp(model, None, _THREADS, _PROMPT + _NEW),
        _LLAMA_ALL: LlamaCpp(model, factors, _THREADS, _PROMPT + _NEW),
    }


def _take_turns(contenders: Mapping[str, Contender], turns: int, console: Console) -> dict[str, list[Turn]]:
    prompt = np.random.default_rng(0).integers(3, 49152, _PROMPT).tolist()
    order = list(contenders)
    shuffler = random.Random(0)
    taken: dict[str, list[Turn]] = {name: [] for name in order}
    with console.status("measuring") as status:
        for index in range(turns):
            shuffler.shuffle(order)
            for name in order:
                status.update(f"turn {index + 1} of {turns}: {name}")
                taken[name].append(_turn(contenders[name], prompt))
    return taken


def _turn(contender: Contender, prompt: Sequence[int]) -> Turn:
    contender.start(prompt[:_SHORT], _NEW)
    _seconds(contender, _UNTIMED)
    contender.stop()
    start = time.perf_counter()
    contender.start(prompt, _NEW)
    prefill = time.perf_counter() - start
    _seconds(contender, _UNTIMED)
    blocks = [_seconds(contender, _BLOCK) / _BLOCK for _ in range(_BLOCKS)]
    contender.stop()
    return Turn(prefill, statistics.median(blocks))


def _seconds(contender: Contender, tokens: int) -> float:
    start = time.perf_counter()
    for _ in range(tokens):
        contender.step()
    return time.perf_counter() - start


def _sizes(package: Package, adapter: Path) -> dict[str, float]:
    """In bytes: the base's weights on disk, an adapter's factors, and what of them is fed (packed q, k, v: B's blocks
    with the zeros between them)."""
    bound = bind(read_adapter(adapter), package)
    own, fed = ([value.nbytes for value in each.values()] for each in (bound.tensors, bound.graph_inputs))
    base = sum((package.path / name).stat().st_size for name in _weight_files(package))
    return {"base": base, "adapter": sum(own), "fed": sum(fed), "adapter / base": sum(own) / base}


def _weight_files(package: Package) -> set[str]:
    return {part.stored.file for point in package.points.values() for part in point.parts}


def _facts(taken: Mapping[str, Sequence[Turn]], precision: str, sizes: Mapping[str, float]) -> dict[str, Any]:
    def median(name: str, what: str) -> float:
        found: float = statistics.median(getattr(turn, what) for turn in taken[name])
        return found

    return {
        "milliseconds a token": {name: 1000 * median(name, "token") for name in taken},
        "milliseconds of the prompt": {name: 1000 * median(name, "prefill") for name in taken},
        "ratio, token": {name: _ratio(taken, name, _PLAIN, "token") for name in taken},
        "ratio, prompt": {name: _ratio(taken, name, _PLAIN, "prefill") for name in taken},
        "bytes": dict(sizes),
        "goals": [asdict(goal) for goal in _goals(taken, precision, sizes["adapter / base"])],
        "turns, milliseconds a token": {name: [1000 * turn.token for turn in turns] for name, turns in taken.items()},
    }


def _ratio(taken: Mapping[str, Sequence[Turn]], one: str, other: str, what: str = "token") -> float:
    """How often `one` takes as long as `other`: of the turns' ratios the median."""
    pairs = zip(taken[one], taken[other], strict=True)
    ratio: float = statistics.median(getattr(first, what) / getattr(second, what) for first, second in pairs)
    return ratio


def _goals(taken: Mapping[str, Sequence[Turn]], precision: str, share: float) -> list[Goal]:
    def at_most(name: str, value: float, limit: float) -> Goal:
        return Goal(name, value, limit, value <= limit)

    rivals = [name for name in (_GENAI_ALL, _PEFT_ALL, _LLAMA_ALL) if name in taken]
    added = [1000 * (switched.token - same.token) for switched, same in zip(taken[_SWITCH], taken[_CALLS], strict=True)]
    goals = [
        *(at_most(f"with an adapter, against {name}", _ratio(taken, _ALL, name), 1.0) for name in rivals),
        at_most("without an adapter, against GenAI's own loop", _ratio(taken, _NONE, _GENAI_BASE), 1.0),
        at_most("growth by r=16 on all seven (1.15 x its bytes)", _ratio(taken, _ALL, _PLAIN) - 1, 1.15 * share),
        at_most("without an adapter, against no points", _ratio(taken, _NONE, _PLAIN), 1.02),
        at_most(f"{_ROWS} adapters in {_ROWS} rows, against one", _ratio(taken, _ROWS_OWN, _ROWS_ONE), 1.15),
        at_most("a switch adds, ms", statistics.median(added), 0.3),
    ]
    if precision == "int4":
        faster = 1 / _ratio(taken, _ALL, _PEFT_ALL)
        goals.append(Goal("tokens a second, times PEFT's (at least)", faster, 8.0, faster >= 8.0))
    return goals


def _show(console: Console, precision: str, facts: Mapping[str, Any]) -> None:
    table = Table(title=f"{precision}: {_PROMPT} tokens of prompt, on {_THREADS} threads", title_justify="left")
    table.add_column("contender")
    for title in ("ms a token", "ratio", "ms of the prompt", "ratio"):
        table.add_column(title, justify="right")
    for name, token in facts["milliseconds a token"].items():
        cells = [token, facts["ratio, token"][name]]
        cells += [facts["milliseconds of the prompt"][name], facts["ratio, prompt"][name]]
        table.add_row(name, f"{cells[0]:.2f}", f"{cells[1]:.3f}", f"{cells[2]:.0f}", f"{cells[3]:.2f}")
    console.print(table)
    console.print(f"the adapter has {facts['bytes']['adapter / base']:.1%} of the base's bytes")
    for goal in facts["goals"]:
        says = "[green]holds[/]" if goal["holds"] else "[red]fails[/]"
        console.print(f"{says}  {goal['name']}: {goal['value']:.3f} (limit {goal['limit']:.3f})", highlight=False)


if __name__ == "__main__":
    main()
