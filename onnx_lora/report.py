"""What people and machines read: tables and JSON on stdout, progress on stderr. It knows facts and results as data, and
how a terminal shows them; it computes nothing that matters."""

from __future__ import annotations

import json
import math
import sys
import time
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

from onnx_lora import results
from onnx_lora.errors import printable
from onnx_lora.results import GeneratedText, GenerateResult
from onnx_lora.wording import format_size, in_words

if TYPE_CHECKING:
    from onnx_lora.demo import DemoResult
    from onnx_lora.demo_text import WriterResult
    from onnx_lora.heat import Heat
    from onnx_lora.runtime import GraphMeasurement, Measurement

__all__ = [
    "Clock",
    "live_texts",
    "progress",
    "show",
    "show_demo",
    "show_generations",
    "show_heat",
    "show_json",
    "show_measurement",
    "show_piece",
    "show_writer",
]

# Lists longer than this are cut in tables; --json has them whole.
_LIST_LIMIT = 12

# Seconds before which a log needs no progress, and between lines of one that goes on.
_SOON, _A_WHILE = 2.0, 30.0

# Of a single text in a table.
_TEXT_LIMIT = 1000  # characters


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress line on stderr; where that is no terminal, a plain line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress(title).update
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(what: str, done: int, total: int) -> None:
            description = escape(_format_line(f"{title}: {what}"))
            bar.update(task, description=description, completed=done, total=total)

        yield update


class _PlainProgress:
    """Lines for a log: one when another thing is done, and one a while. What is over soon says nothing."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start = self._last = time.monotonic()
        self._what = ""

    def update(self, what: str, done: int, total: int) -> None:
        """As the callback of `progress`."""
        now = time.monotonic()
        is_new = what != self._what and now - self._start >= _SOON
        if is_new or now - self._last >= _A_WHILE:
            line = _format_line(f"{self._title}: {what} {done}/{total}, {now - self._start:.0f} s")
            click.echo(line, err=True)
            self._last, self._what = now, what


def show(result: object, *, as_json: bool) -> None:
    """A command's result as JSON, or as a table of two columns. Lists get a line for each item."""
    if as_json:
        show_json(result)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in in_words(result).items():
        table.add_row(_make_cell(name), _make_cell(_format_value(value)))
    _open_stdout().print(table)


def show_json(result: object) -> None:
    """A command's result, one line of JSON on stdout."""
    click.echo(json.dumps(results.as_json(result), allow_nan=False))


def show_heat(heat: Heat) -> None:
    """The map of an adapter's effect."""
    _open_stdout().print(heat.table())


def _open_stdout() -> Console:
    # Written to a file or a pipe, a table must not be cut to 80 columns.
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        lines = [f"{_format_line(str(name))}: {_format_value(item)}" for name, item in value.items()]
        return "\n".join(lines) or "none"
    if isinstance(value, (list, tuple)):
        lines = [_format_value(item) for item in value[:_LIST_LIMIT]]
        if len(value) > _LIST_LIMIT:
            lines.append(f"… and {len(value) - _LIST_LIMIT} more (--json has them all)")
        return "\n".join(lines) or "none"
    return _format_line(str(value))


def _format_line(text: str) -> str:
    """A name or a note out of a file, on one line."""
    return printable(text, _TEXT_LIMIT, one_line=True)


def _make_cell(text: str) -> Text:
    """A text that rich prints as it stands: in a str it would take words in brackets for its markup."""
    return Text(text, overflow="fold")


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

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self._first

    @property
    def rate(self) -> float:
        """Tokens a second. The prompt's share is left out: it belongs to the first token."""
        writing = self._last - self._first
        return (self.tokens - 1) / writing if writing > 0 else 0.0


def show_piece(text: str) -> None:
    """A piece of a text that is being written."""
    click.echo(_make_safe(text), nl=False)


def _make_safe(text: str) -> str:
    """A model may write anything: its control characters must not steer a terminal. A pipe gets the text as it is."""
    return printable(text, len(text)) if sys.stdout.isatty() else text


def show_generations(prompts: Sequence[str], written: Sequence[Written], clock: Clock, *, as_json: bool) -> None:
    """The texts behind their prompts. A single prompt's was shown as it came, and lacks the end of its line."""
    texts: list[GeneratedText] = []
    for prompt, own in zip(prompts, written, strict=True):
        texts.append(GeneratedText(prompt, own.text, own.tokens, own.prompt_tokens, own.reason))
    if as_json:
        show_json(GenerateResult(texts, clock.tokens, clock.first, clock.rate))
        return
    if len(texts) == 1:
        click.echo()
    else:
        for index, each in enumerate(texts, start=1):
            click.echo(f"=== {index}: {_make_safe(each.prompt)}\n{_make_safe(each.text)}\n")
    reasons = ", ".join(str(each.reason) for each in texts)
    click.echo(
        f"{clock.tokens} tokens, {clock.rate:.1f} a second, the first after {clock.first:.2f} s; ended by {reasons}",
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
        yield lambda texts: live.update(_make_columns(texts))


def _make_columns(texts: Mapping[str, str]) -> Table:
    table = Table(title="One prompt, one batch, every row under another adapter", title_justify="left")
    for name in texts:
        table.add_column(_make_cell(name), overflow="fold", ratio=1)
    table.add_row(*(Text(printable(text)) for text in texts.values()))
    return table


def show_writer(result: WriterResult) -> None:
    """What every row wrote, and what was checked."""
    console = _open_stdout()
    console.print(_make_columns({row.name: row.text for row in result.rows}))
    for row in result.rows:
        console.print(f"[bold]{row.name}[/]: {row.says}")
    same = sum(row.alone for row in result.rows)
    console.print(
        f"{same} of {len(result.rows)} rows write alone, greedily, token for token what they write in the batch; "
        f"{result.tokens_per_second:.0f} tokens a second over all rows."
    )
    base, adapters = format_size(result.base_bytes), format_size(result.adapter_bytes)
    console.print(f"Base model in 8 bits {base}, four adapters {adapters}.")


def show_measurement(result: Measurement) -> None:
    """What was measured of an adapter on a package, and what follows."""
    console = _open_stdout()
    where = ", ".join(result.providers) or "the default providers"
    threads = ""
    if result.threads is not None:
        threads = ", 1 thread" if result.threads == 1 else f", {result.threads} threads"
    console.print(_make_cell(_format_line(f"{result.adapter} on {result.package} ({where}{threads})")))
    console.print(_make_times(result.graphs))
    console.print(_make_starts(result.graphs))
    for reason in result.advice.reasons:
        console.print(_make_cell(_format_line(reason)))


def _make_times(graphs: Sequence[GraphMeasurement]) -> Table:
    """A line for each kind of call, a column for each way to run it."""
    table = Table()
    table.add_column("call", justify="left")
    for heading in ("base", "points, no adapter", "adapter apart", "adapter folded", "rounds"):
        table.add_column(heading, justify="right")
    for graph in graphs:
        for times in graph.calls:
            cells = [
                _format_beside(times.base, times.base),
                _format_beside(times.without_adapter, times.base),
                _format_beside(times.delta, times.base),
                _format_beside(times.folded, times.base),
            ]
            name = _name_in_graph(times.call, graph, graphs)
            table.add_row(_make_cell(_format_line(name)), *cells, str(times.rounds))
    return table


def _make_starts(graphs: Sequence[GraphMeasurement]) -> Table:
    """A line for each thing that starting a graph took."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for graph in graphs:
        for what, value in _describe_start(graph).items():
            name = _name_in_graph(what, graph, graphs)
            table.add_row(_make_cell(_format_line(name)), value)
    return table


def _name_in_graph(what: str, graph: GraphMeasurement, graphs: Sequence[GraphMeasurement]) -> str:
    """With the graph's name in front, where a package has several graphs."""
    return what if len(graphs) == 1 else f"{graph.graph}: {what}"


def _format_beside(seconds: float | None, base: float) -> str:
    """A call's time, and how far it is from the base's."""
    if seconds is None:
        return "-"
    milliseconds = f"{1000 * seconds:.3g} ms"
    return milliseconds if seconds == base else f"{milliseconds} ({seconds / base - 1:+.0%})"


def _describe_start(graph: GraphMeasurement) -> dict[str, str]:
    """What starting took, in words."""
    said = {
        "start a session without points": f"{graph.start_base:.3g} s",
        "start one with points": f"{graph.start_delta:.3g} s",
    }
    if graph.load is not None:
        said["load the adapter"] = f"{graph.load:.3g} s, {format_size(graph.adapter_bytes)}"
    if graph.fold is not None:
        said["fold it and start a session"] = f"{graph.fold:.3g} s, {format_size(graph.folded_bytes or 0)} of weights"
    if graph.folded_resident_bytes is not None:
        said["the process grew meanwhile by"] = format_size(graph.folded_resident_bytes)
    return said


def show_demo(result: DemoResult) -> None:
    """The demo's answers and measurements."""
    console = _open_stdout()
    console.print(_make_answers(result))
    rows = len(result.sentences) * len(result.tasks)
    console.print(
        f"[bold]Mixed batch:[/] {rows} rows in one call, each under its own adapter: "
        f"largest difference from single calls {result.mixed_difference:.1g}."
    )
    console.print(
        f"[bold]Folded in:[/] W0 + s·B·A before the session starts: largest difference {result.fold_difference:.1g}."
    )
    times = Table(box=None, pad_edge=False, show_header=False)
    for name, seconds in result.seconds.items():
        times.add_row(name, f"{1000 * seconds:.3g} ms")
    console.print(times)
    ratio = math.ceil(result.base_bytes / max(1, result.adapter_bytes))
    console.print(
        f"Base model {format_size(result.base_bytes)}, four adapters together {format_size(result.adapter_bytes)} "
        f"({ratio} times smaller)."
    )
    accuracies = ", ".join(f"{task.name} {task.accuracy:.1%}" for task in result.tasks)
    console.print(f"[dim]Test accuracy: {accuracies}.")
    if result.package is not None:
        console.print(f"The package is in {result.package}; look at it with: onnx-lora inspect {result.package}")


def _make_answers(result: DemoResult) -> Table:
    """A line for each sentence, a column for each task."""
    table = Table(title="One base model, one session, a different adapter in every call", title_justify="left")
    table.add_column("sentence", overflow="fold", ratio=2)
    for task in result.tasks:
        table.add_column(f"{task.name}\n[dim]rank {task.rank}, {format_size(task.size_bytes)}", overflow="fold")
    for sentence, answers in zip(result.sentences, result.answers, strict=True):
        cells = [f"{answer.label} [dim]{answer.probability:.0%}" for answer in answers]
        table.add_row(sentence, *cells)
    return table
