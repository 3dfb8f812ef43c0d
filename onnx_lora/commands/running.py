"""Commands that run packages: run, generate, fold, demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click
import numpy as np

from onnx_lora import report
from onnx_lora.adapters import bind, blend
from onnx_lora.commands import outputs
from onnx_lora.commands.given import SPELLING, adapter_name_option, by_label, choose_adapters, parse_adapters
from onnx_lora.commands.options import json_option, read_feeds, strict_option, unproven_option
from onnx_lora.commands.outputs import force_option, new_file
from onnx_lora.package import Package
from onnx_lora.results import DemoRun, FoldResult, RunOutput, RunResult
from onnx_lora.whatis import Thing

if TYPE_CHECKING:
    from onnx_lora.adapters import BoundAdapter
    from onnx_lora.runtime import Sampling

__all__ = ["demo", "fold", "generate", "run"]

P = ParamSpec("P")
R = TypeVar("R")


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--input", "feeds", type=click.Path(path_type=Path), required=True, help="An .npz file: inputs by name.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="An .npz file: outputs by name.")
@click.option("--adapter", "adapters", multiple=True, metavar=SPELLING, help="Several are blended.")
@adapter_name_option
@click.option("--rows", metavar="NAME,NAME,...", help='One adapter per row of the batch; "-" is the base.')
@click.option("--graph", help="Which graph, where the package has several.")
@force_option
@unproven_option
@strict_option
@json_option
def run(
    package: Path,
    feeds: Path,
    output: Path,
    adapters: Sequence[str],
    adapter_name: str | None,
    rows: str | None,
    graph: str | None,
    force: bool,
    allow_unproven: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Run PACKAGE once on the inputs of an .npz file.

    \b
    Example:  onnx-lora run smollm --input feeds.npz --output out.npz --adapter sql=adapters/sql:0.7
    """
    from onnx_lora.runtime import AdapterSession

    parts = by_label(parse_adapters(adapters, adapter_name))
    choice = choose_adapters(parts, rows)
    with new_file(output, (".npz",), force=force) as temporary:
        session = AdapterSession(Package.open(package, allow_unproven=allow_unproven), graph=graph)
        for name, given in parts.items():
            session.load_adapter(name, given.read(), strict=strict)
        values = session.run(None, read_feeds(feeds), adapter=choice)
        results = dict(zip([value.name for value in session.get_outputs()], values, strict=True))
        np.savez(temporary, **results)
    outputs = [RunOutput(name, value.shape, value.dtype.name) for name, value in results.items()]
    report.show(RunResult(outputs, str(output)), as_json=as_json)


def sampling_options(command: Callable[P, R]) -> Callable[..., R]:
    """How tokens are chosen, and when to stop, as `generate` takes it."""

    @click.option("--max-tokens", type=int, default=128, help="Of each text.", show_default=True)
    @click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token.", show_default=True)
    @click.option("--top-k", type=int, default=0, help="Draw from so many; 0: from all.", show_default=True)
    @click.option("--top-p", type=float, default=1.0, help="Draw from so much probability.", show_default=True)
    @click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 repeats less.", show_default=True)
    @click.option("--seed", type=int, help="The same seed draws the same text.")
    @click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; several times.")
    @wraps(command)
    def wrapped(
        *args: Any,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        repetition_penalty: float,
        seed: int | None,
        stop: Sequence[str],
        **kwargs: Any,
    ) -> R:
        from onnx_lora.runtime import Sampling

        sampling = Sampling(max_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop)
        return command(*args, sampling=sampling, **kwargs)  # type: ignore[arg-type]

    return wrapped


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, metavar="TEXT", help="Several make one batch.")
@click.option("--adapter", "adapters", multiple=True, metavar=SPELLING, help="Several are blended.")
@adapter_name_option
@click.option("--rows", metavar="NAME,NAME,...", help='One adapter per prompt; "-" is the base.')
@click.option("--chat", is_flag=True, help="A prompt is what a user says: apply the package's chat template.")
@click.option("--graph", help="Which graph, where the package has several.")
@unproven_option
@sampling_options
@strict_option
@json_option
def generate(
    package: Path,
    prompts: Sequence[str],
    adapters: Sequence[str],
    adapter_name: str | None,
    rows: str | None,
    chat: bool,
    graph: str | None,
    allow_unproven: bool,
    sampling: Sampling,
    strict: bool,
    as_json: bool,
) -> None:
    """Write on behind prompts. One prompt's text comes as it is written; several are one batch.

    \b
    Example:  onnx-lora generate smollm --prompt "Once upon a time" --adapter sql=adapters/sql --max-tokens 64
    """
    from onnx_lora.runtime import Chat, TextGenerator

    parts = by_label(parse_adapters(adapters, adapter_name))
    choice = choose_adapters(parts, rows)
    asked = [Chat([{"role": "user", "content": prompt}]) if chat else prompt for prompt in prompts]
    generator = TextGenerator(Package.open(package, allow_unproven=allow_unproven), graph=graph)
    for name, given in parts.items():
        generator.load_adapter(name, given.read(), strict=strict)
    clock = report.Clock()
    with generator.stream(asked, adapter=choice, sampling=sampling) as stream:
        for piece in stream:
            clock.tick()
            if len(prompts) == 1 and not as_json:
                report.show_piece(piece.text)
    report.show_generations(prompts, stream.results, clock, as_json=as_json)


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, required=True, metavar=SPELLING, help="Several are blended.")
@adapter_name_option
@click.option("--graph", help="Which graph, where the package has several (default: all).")
@click.option("--requantize", is_flag=True, help="Fold into quantized weights too, and say what rounding cost.")
@click.option("--source", type=click.Path(path_type=Path), help="The float package that PACKAGE was quantized from.")
@force_option
@unproven_option
@strict_option
@json_option
def fold(
    package: Path,
    out: Path,
    adapters: Sequence[str],
    adapter_name: str | None,
    graph: str | None,
    requantize: bool,
    source: Path | None,
    force: bool,
    allow_unproven: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Fold adapters into PACKAGE's weights and write an ordinary model folder OUT.

    \b
    Example:  onnx-lora fold smollm sql-model --adapter adapters/sql
    """
    from onnx_lora.runtime import Requantize, fold_to

    if source is not None and not requantize:
        raise click.UsageError("--source says where --requantize finds the float weights; give both")
    permission = Requantize(None if source is None else Package.open(source)) if requantize else None
    opened = Package.open(package, allow_unproven=allow_unproven)
    parts: list[tuple[BoundAdapter, float]] = []
    for given in parse_adapters(adapters, adapter_name):
        parts.append((bind(given.read(), opened, strict=strict), given.weight))
    blend(parts)  # says what cannot be blended before anything is copied
    replaceable = (Thing.ONNX, Thing.GENAI)
    with outputs.output(out, force=force, kinds=replaceable) as place, report.progress("folding") as progress:
        fold_to(
            opened,
            parts,
            place,
            graph=graph,
            requantize=permission,
            progress=lambda done, total: progress("fold", done, total),
        )
    report.show(FoldResult.of(out, parts, permission), as_json=as_json)


@click.command()
@click.option("--text", multiple=True, help="Your own sentence, several times.")
@click.option("--prompt", help="Your own beginning, for the model that writes.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep the first part's package here.")
@json_option
def demo(text: Sequence[str], prompt: str | None, keep: Path | None, as_json: bool) -> None:
    """Four tasks on one small model, switched, mixed, folded; then a tiny writer. The writer continues one text under
    four adapters at once.

    \b
    Example:  onnx-lora demo --text "Win a free cruise, call now!" --prompt "The king"
    """
    from onnx_lora.demo import run_demo
    from onnx_lora.demo_text import run_writer

    with report.progress("demo") as progress:
        result = run_demo(list(text), keep=keep, progress=progress)
    if not as_json:
        report.show_demo(result)
    with report.live_texts(quiet=as_json) as show:
        written = run_writer(prompt, show=show)
    if as_json:
        report.show_json(DemoRun(result, written))
    else:
        report.show_writer(written)
