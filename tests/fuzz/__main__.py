"""`python -m tests.fuzz`: a campaign, or one input again."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import traceback
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from onnx_lora import OnnxLoraError
from tests.fuzz.campaign import Plan, Summary, jobs, run

# What a caller may tell apart.
_FAILED, _NOT_FINISHED = 1, 3


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--memory", default=1_000_000, show_default=True, help="Inputs of the readers in memory.")
@click.option("--model", default=20_000, show_default=True, help="Inputs of export, attach, open, run and fold.")
@click.option("--seconds", type=float, help="Stop then; the next run goes on.")
@click.option("--seed", default=0, show_default=True, help="Another seed, other inputs.")
@click.option("--jobs", "processes", type=int, default=jobs, help="Processes at once; one a core by default.")
@click.option("--only", multiple=True, help="This target alone; may be given several times.")
@click.option(
    "--state", type=click.Path(path_type=Path), default=Path(".fuzz"), show_default=True, help="Where it lies."
)
@click.option("--table", default="tests.fuzz.targets", hidden=True)
@click.option("--replay", type=click.Path(exists=True, path_type=Path), help="A failure's folder: do it once more.")
def main(
    memory: int,
    model: int,
    seconds: float | None,
    seed: int,
    processes: int,
    only: tuple[str, ...],
    state: Path,
    table: str,
    replay: Path | None,
) -> None:
    """Give mutated files to everything that reads files: only errors of ours may come out, in bounded time and memory.

    A run that was stopped goes on where it was. A JSON summary goes to stdout. Exit code 0: all tried, nothing found;
    1: failures, kept under STATE/failures; 3: nothing found yet, and not finished.
    """
    if replay is not None:
        sys.exit(_replay(replay, table))
    plan = Plan(state.resolve(), seed, memory, model, seconds, processes, only, table)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("make samples", total=None)

        def tell(summary: Summary) -> None:
            found = sum(summary.failures.values())
            progress.update(
                bar,
                description=f"{found} failures" if found else "nothing found",
                completed=summary.tried,
                total=sum(summary.planned.values()),
            )

        try:
            summary = run(plan, tell)
        except KeyboardInterrupt:
            console.print(f"stopped; the same command goes on from {plan.folder}")
            sys.exit(_NOT_FINISHED)
    for name, needs in summary.skipped.items():
        console.print(f"skipped: {name} (needs {', '.join(needs)})")
    for signature, count in summary.failures.items():
        console.print(f"{count} × {signature}", markup=False)
    click.echo(_told(summary, plan))
    sys.exit(_FAILED if summary.failures else 0 if summary.finished else _NOT_FINISHED)


def _told(summary: Summary, plan: Plan) -> str:
    """The summary without what only the next run needs."""
    whole = json.loads(summary.to_json())
    del whole["done"]
    tried = {"tried": summary.tried, "finished": summary.finished, "seconds": round(summary.seconds, 1)}
    return json.dumps(whole | tried | {"state": str(plan.folder)}, indent=1)


def _replay(folder: Path, table: str) -> int:
    """One kept input once more, in this process: a debugger can be put on it."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    target = next(target for target in importlib.import_module(table).TARGETS if target.name == report["target"])
    with tempfile.TemporaryDirectory(prefix="onnx_lora.fuzz.") as out:
        try:
            target.use(folder / "files", Path(out))
        except OnnxLoraError as error:
            if type(error).__name__ == "InternalError":
                traceback.print_exc()
                return _FAILED
            click.echo(f"refused: {type(error).__name__}: {error}")
            return 0
        except BaseException:  # noqa: BLE001 - what this is all about
            traceback.print_exc()
            return _FAILED
    click.echo("accepted")
    return 0


if __name__ == "__main__":
    main()
