"""What people and machines read: tables on stdout, progress on stderr. It knows packages and adapters
as data, and computes nothing that matters."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from onnx_lora.errors import printable

if TYPE_CHECKING:
    from onnx_lora.adapters import Adapter, BoundAdapter, Replacement
    from onnx_lora.demo import DemoResult
    from onnx_lora.demo_text import WriterResult
    from onnx_lora.exporter import Comparison
    from onnx_lora.heat import Heat
    from onnx_lora.package import Package
    from onnx_lora.runtime import GraphMeasurement, Measurement, Requantize

__all__ = [
    "Clock",
    "adapter_facts",
    "by_reason",
    "coverage_facts",
    "live_texts",
    "package_facts",
    "progress",
    "show",
    "show_demo",
    "show_generations",
    "show_heat",
    "show_measurement",
    "show_piece",
    "show_writer",
    "verification_facts",
]

Facts = dict[str, Any]

# Lists longer than this are cut in tables; --json has them whole.
_LIST_LIMIT = 12

# Of a single text in a table.
_TEXT_LIMIT = 1000  # characters


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress line on stderr; silent where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda what, done, total: bar.update(
            task, description=escape(_shown(f"{title}: {what}")), completed=done, total=total
        )


def show(facts: Facts, *, as_json: bool) -> None:
    """Facts as JSON, or as a table of two columns. Lists get a line for each item; tuples are shapes."""
    if as_json:
        click.echo(json.dumps(facts, default=str))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(_cell(name.replace("_", " ")), _cell(_text(value)))
    _stdout().print(table)


def show_heat(heat: Heat) -> None:
    """The map of an adapter's effect."""
    _stdout().print(heat.table())


def _stdout() -> Console:
    # Written to a file or a pipe, a table must not be cut to 80 columns.
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "\n".join(f"{_shown(str(name))}: {_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, tuple):
        return _shape(value)
    if isinstance(value, list):
        more = f"\n… and {len(value) - _LIST_LIMIT} more (--json has them all)" if len(value) > _LIST_LIMIT else ""
        return "\n".join(_text(item) for item in value[:_LIST_LIMIT]) + more or "none"
    return _shown(str(value))


def _shown(text: str) -> str:
    """A name or a note out of a file, on one line."""
    return printable(text, _TEXT_LIMIT, one_line=True)


def _cell(text: str) -> Text:
    """As it stands: rich would take [words] in brackets for its own."""
    return Text(text, overflow="fold")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _data_bytes(package: Package) -> int:
    graphs = {file for graph in package.manifest.graphs for file in (graph.file, graph.base_file)}
    stored = {part.stored.file for graph in package.manifest.graphs for point in graph.points for part in point.parts}
    return sum((package.path / file).stat().st_size for file in stored | graphs)


def package_facts(package: Package, *, full: bool = False) -> Facts:
    """What a package offers to adapters, and what of its graphs it does not."""
    graphs = package.manifest.graphs
    points = list(package.points.values())
    kinds = Counter(module.rpartition(".")[2] for module in package.points)
    facts: Facts = {
        "package": str(package.path),
        "made_from": package.manifest.source,
        "graphs": [graph.name for graph in graphs],
        "points": len(points),
        "points_by_name": dict(kinds),
        "without_rows": [point.module for point in points if not point.per_row],
        "replaceable": {name: _shape(weight.shape) for name, weight in package.replaceable.items()},
        "without_point": [
            f"{graph.name}: {entry.node}: {entry.reason}" for graph in graphs for entry in graph.unplaced
        ],
        "unproven": by_reason(package.unproven),
        "not_targeted": sorted({module for graph in graphs for module in graph.untargeted}),
        "size": _size(_data_bytes(package)),
        "fingerprint": package.fingerprint,
    }
    if full:
        facts["modules"] = {
            point.module: f"{point.in_features} → {point.out_features} {point.dtype}" for point in points
        }
    return facts


def by_reason(doubts: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by what is said of them."""
    names: dict[str, list[str]] = {}
    for name, reason in doubts.items():
        names.setdefault(reason, []).append(name)
    return names


def adapter_facts(adapter: Adapter) -> Facts:
    """What an adapter's files hold."""
    size = 0
    for delta in adapter.deltas.values():
        size += delta.a.nbytes + delta.b.nbytes
    for replacement in adapter.replacements.values():
        size += replacement.value.nbytes
    ranks = Counter(delta.rank for delta in adapter.deltas.values())
    scales = Counter(round(delta.scale, 6) for delta in adapter.deltas.values())
    return {
        "adapter": adapter.origin.path,
        "format": adapter.origin.format,
        "method": adapter.origin.method,
        "base_model": adapter.origin.base_model,
        "modules": len(adapter.deltas) + len(adapter.changes),
        "changes": dict(Counter(change.method for change in adapter.changes.values())),
        "ranks": {f"rank {rank}": f"{count} modules" for rank, count in sorted(ranks.items())},
        "scales": {f"scale {scale:g}": f"{count} modules" for scale, count in sorted(scales.items())},
        "whole_weights": {name: _whole(entry) for name, entry in adapter.replacements.items()},
        "size": _size(size),
        "notes": list(adapter.notes),
    }


def _whole(entry: Replacement) -> str:
    """Its shape, and what is done with it if it does not take the base's place."""
    what = {"set": "", "add": " added to the base's", "multiply": " times the base's, if there is one"}
    return _shape(entry.value.shape) + what[entry.operation]


def coverage_facts(bound: BoundAdapter, package: Package | None = None) -> Facts:
    """What a bound adapter does to its package."""
    coverage = bound.coverage
    size = sum(value.nbytes for value in bound.tensors.values())
    facts: Facts = {
        "applied": f"{len(coverage.applied)} of {len(coverage.applied) + len(coverage.at_base)} points",
        "left_at_base": list(coverage.at_base),
        "replaced": list(coverage.replaced),
        "without_effect": list(coverage.silent),
        "only_folds": dict(coverage.fold_only),
        "bound_size": _size(size),
        "notes": list(coverage.notes),
    }
    if package is not None:
        base = _data_bytes(package)
        facts["smaller_than_the_base"] = f"{base / size:.0f} times" if size else "it is empty"
    return facts


def rounding_facts(leave: Requantize | None) -> Facts:
    """What folding into quantized weights cost, the worst modules first."""
    if leave is None:
        return {}
    ordered = sorted(leave.rounding.items(), key=lambda entry: -entry[1].of_change)
    return {
        "error of weights": {module: rounding.of_weight for module, rounding in ordered},
        "error of the change": {module: rounding.of_change for module, rounding in ordered},
    }


def verification_facts(comparisons: Sequence[Comparison]) -> Facts:
    """The largest difference by case and graph, then each output."""
    worst: dict[str, float] = {}
    for entry in comparisons:
        key = f"{entry.graph}, {entry.case}"
        worst[key] = max(worst.get(key, 0.0), entry.difference)
    return {
        "agrees": all(entry.agrees for entry in comparisons),
        "largest_difference": worst,
        "outputs": [
            f"{entry.graph}, {entry.case}, {entry.output}: {entry.difference:.3g} (allowed {entry.allowed:.3g})"
            for entry in comparisons
        ],
    }


class Written(Protocol):
    """A text that was generated, as the runtime gives it."""

    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> tuple[int, ...]: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def reason(self) -> str | None: ...


class Clock:
    """Counts tokens against the time since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = 0.0  # seconds until the first token
        self._last = 0.0  # seconds until the last one
        self.tokens = 0

    def tick(self) -> None:
        self._last = time.perf_counter() - self._start
        self._first = self._first or self._last
        self.tokens += 1

    def facts(self) -> Facts:
        """The prompt's share is left out of the rate: it belongs to the first token."""
        writing = self._last - self._first
        rate = (self.tokens - 1) / writing if writing > 0 else 0.0
        return {"tokens": self.tokens, "first_token_seconds": self._first, "tokens_per_second": rate}


def show_piece(text: str) -> None:
    """A piece of a text that is being written."""
    click.echo(_on_terminal(text), nl=False)


def _on_terminal(text: str) -> str:
    """What a model wrote is anybody's: a terminal is not steered by it. A pipe gets it as it is."""
    return printable(text, len(text)) if sys.stdout.isatty() else text


def show_generations(prompts: Sequence[str], results: Sequence[Written], clock: Clock, *, as_json: bool) -> None:
    """The texts behind their prompts. A single prompt's was shown as it came, and lacks the end of its line."""
    facts = clock.facts()
    if as_json:
        texts = [
            {
                "prompt": prompt,
                "text": result.text,
                "tokens": list(result.tokens),
                "prompt_tokens": result.prompt_tokens,
                "reason": result.reason,
            }
            for prompt, result in zip(prompts, results, strict=True)
        ]
        click.echo(json.dumps({"generations": texts} | facts))
        return
    if len(results) == 1:
        click.echo()
    else:
        for index, (prompt, result) in enumerate(zip(prompts, results, strict=True), start=1):
            click.echo(f"=== {index}: {_on_terminal(prompt)}\n{_on_terminal(result.text)}\n")
    reasons = ", ".join(str(result.reason) for result in results)
    click.echo(
        f"{facts['tokens']} tokens, {facts['tokens_per_second']:.1f} a second, "
        f"the first after {facts['first_token_seconds']:.2f} s; ended by {reasons}",
        err=True,
    )


@contextmanager
def live_texts(*, quiet: bool) -> Iterator[Callable[[Mapping[str, str]], object]]:
    """A place on the screen for texts that grow side by side; nothing where there is no screen."""
    console = Console()
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, transient=True, refresh_per_second=20) as live:
        yield lambda texts: live.update(_side_by_side(texts))


def _side_by_side(texts: Mapping[str, str]) -> Table:
    table = Table(title="One prompt, one batch, every row under another adapter", title_justify="left")
    for name in texts:
        table.add_column(_cell(name), overflow="fold", ratio=1)
    table.add_row(*(Text(printable(text)) for text in texts.values()))
    return table


def show_writer(result: WriterResult) -> None:
    """What every row wrote, and what was checked."""
    console = _stdout()
    console.print(_side_by_side({row.name: row.text for row in result.rows}))
    for row in result.rows:
        console.print(f"[bold]{row.name}[/]: {row.says}")
    same = sum(row.alone for row in result.rows)
    console.print(
        f"{same} of {len(result.rows)} rows write alone, greedily, token for token what they write in the batch; "
        f"{result.tokens_per_second:.0f} tokens a second over all rows."
    )
    console.print(f"Base model in 8 bits {_size(result.base_bytes)}, four adapters {_size(result.adapter_bytes)}.")


def show_measurement(result: Measurement) -> None:
    """What was measured of an adapter on a package, and what follows."""
    console = _stdout()
    where = ", ".join(result.providers) or "the default providers"
    threads = ""
    if result.threads is not None:
        threads = ", 1 thread" if result.threads == 1 else f", {result.threads} threads"
    console.print(_cell(_shown(f"{result.adapter} on {result.package} ({where}{threads})")))
    table = Table()
    for heading in ("call", "base", "points, no adapter", "adapter apart", "adapter folded", "rounds"):
        table.add_column(heading, justify="left" if heading == "call" else "right")
    for graph in result.graphs:
        for times in graph.calls:
            name = times.call if len(result.graphs) == 1 else f"{graph.graph}: {times.call}"
            ways = (times.base, times.without_adapter, times.delta, times.folded)
            table.add_row(_cell(_shown(name)), *(_beside(way, times.base) for way in ways), str(times.rounds))
    console.print(table)
    starts = Table(box=None, pad_edge=False, show_header=False)
    for graph in result.graphs:
        for what, value in _starts(graph).items():
            name = what if len(result.graphs) == 1 else f"{graph.graph}: {what}"
            starts.add_row(_cell(_shown(name)), value)
    console.print(starts)
    for reason in result.advice.reasons:
        console.print(_cell(_shown(reason)))


def _beside(seconds: float | None, base: float) -> str:
    """A call's time, and how far it is from the base's."""
    if seconds is None:
        return "-"
    milliseconds = f"{1000 * seconds:.3g} ms"
    return milliseconds if seconds == base else f"{milliseconds} ({seconds / base - 1:+.0%})"


def _starts(graph: GraphMeasurement) -> dict[str, str]:
    """What starting took, in words."""
    said = {
        "start a session without points": f"{graph.start_base:.3g} s",
        "start one with points": f"{graph.start_delta:.3g} s",
    }
    if graph.load is not None:
        said["load the adapter"] = f"{graph.load:.3g} s, {_size(graph.adapter_bytes)}"
    if graph.fold is not None:
        said["fold it and start a session"] = f"{graph.fold:.3g} s, {_size(graph.folded_bytes or 0)} of weights"
    if graph.folded_resident is not None:
        said["the process grew meanwhile by"] = _size(graph.folded_resident)
    return said


def show_demo(result: DemoResult) -> None:
    """The demo's answers and measurements."""
    console = _stdout()
    table = Table(title="One base model, one session, a different adapter in every call", title_justify="left")
    table.add_column("sentence", overflow="fold", ratio=2)
    for task in result.tasks:
        table.add_column(f"{task.name}\n[dim]rank {task.rank}, {task.kilobytes:.0f} kB", overflow="fold")
    for index, sentence in enumerate(result.sentences):
        cells = [f"{answer.label} [dim]{answer.probability:.0%}" for answer in result.answers[index]]
        table.add_row(sentence, *cells)
    console.print(table)
    rows = len(result.sentences) * len(result.tasks)
    console.print(
        f"[bold]Mixed batch:[/] {rows} rows in one call, each under its own adapter: "
        f"largest difference from single calls {result.mixed_difference:.1g}."
    )
    console.print(
        f"[bold]Folded in:[/] W0 + s·B·A before the session starts: largest difference {result.fold_difference:.1g}."
    )
    times = Table(box=None, pad_edge=False, show_header=False)
    for name, milliseconds in result.milliseconds.items():
        times.add_row(name, f"{milliseconds:.3g} ms")
    console.print(times)
    console.print(
        f"Base model {_size(result.base_bytes)}, four adapters together {_size(result.adapter_bytes)} "
        f"({math.ceil(result.base_bytes / max(1, result.adapter_bytes))} times smaller)."
    )
    console.print("[dim]Test accuracy: " + ", ".join(f"{task.name} {task.accuracy:.1%}" for task in result.tasks) + ".")
    if result.package is not None:
        console.print(f"The package is in {result.package}; look at it with: onnx-lora inspect {result.package}")
