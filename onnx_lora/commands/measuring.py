"""The command that measures: fold or delta?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from onnx_lora import report
from onnx_lora.commands.given import SPELLING, adapter_name_option, parse_adapters
from onnx_lora.commands.options import json_option, read_feeds, strict_option, unproven_option

__all__ = ["measure"]


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, required=True, metavar=SPELLING, help="Several are blended.")
@adapter_name_option
@click.option("--graph", help="Which graph, where the package has several (default: all).")
@click.option("--feeds", type=click.Path(path_type=Path), help="An .npz file: inputs by name (default: made up).")
@click.option("--tokens", type=int, default=32, help="Of the inputs that are made up.", show_default=True)
@click.option("--providers", metavar="NAME,NAME,...", help="ONNX Runtime's execution providers, in order.")
@click.option("--threads", type=int, help="Of one operator (default: ONNX Runtime's).")
@click.option("--rounds", type=int, default=30, help="How often each kind of call is timed.", show_default=True)
@click.option("--seconds", type=float, default=10.0, help="And for how long at most.", show_default=True)
@unproven_option
@strict_option
@json_option
def measure(
    package: Path,
    adapters: Sequence[str],
    adapter_name: str | None,
    graph: str | None,
    feeds: Path | None,
    tokens: int,
    providers: str | None,
    threads: int | None,
    rounds: int,
    seconds: float,
    allow_unproven: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Measure whether an adapter is better folded into PACKAGE or kept apart. The base, the adapter apart and the
    adapter folded take turns on this machine, and what follows is said in words.

    \b
    Example:  onnx-lora measure smollm --adapter adapters/sql
    """
    from onnx_lora.runtime import measure as run_measure

    with report.progress("measuring") as progress:
        result = run_measure(
            package,
            [(one.read(), one.weight) for one in parse_adapters(adapters, adapter_name)],
            graph=graph,
            feeds=None if feeds is None else read_feeds(feeds),
            tokens=tokens,
            providers=None if providers is None else [name.strip() for name in providers.split(",")],
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            strict=strict,
            allow_unproven=allow_unproven,
            progress=progress,
        )
    if as_json:
        report.show_json(result)
    else:
        report.show_measurement(result)
