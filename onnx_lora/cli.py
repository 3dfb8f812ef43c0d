"""The command line: each command reads its arguments, calls one function, and reports.

Results go to stdout (tables, or JSON with `--json`), progress and errors to stderr. Exit codes: 0 done,
1 a fault of ours, 2 wrong input, 3 the world failed (missing package, full disk), 4 a verification failed, 130
interrupted, 143 and 129 told to end (SIGTERM, SIGHUP)."""

from __future__ import annotations

import io
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import click
import numpy as np

from onnx_lora import __version__, report
from onnx_lora.adapters import bind, blend, read_adapter
from onnx_lora.adapters.adapter import refuse_fold_only
from onnx_lora.adapters.compose import blended
from onnx_lora.adapters.effect import effects
from onnx_lora.adapters.write import FORMATS, AdapterFormat, write_adapter
from onnx_lora.boundary import translated, unread
from onnx_lora.errors import FeedError, InputError, InternalError, OnnxLoraError, printable
from onnx_lora.heat import PICTURES, Heat
from onnx_lora.manifest import MANIFEST
from onnx_lora.package import Package
from onnx_lora.staging import staged_place

if TYPE_CHECKING:
    from onnx_lora.runtime import Sampling

__all__ = ["main"]

P = ParamSpec("P")
R = TypeVar("R")

_INTERRUPTED = 130

# Of a fault of ours, to be reported whole.
_TRACEBACK_LIMIT = 20_000  # characters


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnx-lora")
def cli() -> None:
    """Export a base model to ONNX once; fold, switch, blend and mix LoRA adapters on ONNX Runtime.

    \b
    Try it:  onnx-lora demo
    """


def main() -> None:
    """The entry point: every error becomes a message and an exit code."""
    as_json = "--json" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few letters must not end a run
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        if as_json:
            _echo_error("UsageError", printable(error.format_message()))
        said = io.StringIO()
        error.show(said)
        click.echo(printable(said.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the last boundary of all; a traceback is shown of what is no user's
        _end_with(translated(error), error, as_json=as_json)


def _end_with(error: OnnxLoraError, cause: Exception, *, as_json: bool) -> None:
    if as_json:
        _echo_error(type(error).__name__, error.message, error.path, error.problems)
    if isinstance(error, InternalError):
        click.echo(printable("".join(traceback.format_exception(cause)), _TRACEBACK_LIMIT), err=True)
    click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


def _echo_error(kind: str, message: str, path: str | None = None, problems: Sequence[str] = ()) -> None:
    click.echo(json.dumps({"error": kind, "message": message, "path": path, "problems": problems}))


def _json_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def _unproven_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option(
        "--allow-unproven",
        is_flag=True,
        help="Take points at which the graph may compute something else than the module; `inspect` shows which.",
    )(command)


def _strict_option(command: Callable[P, R]) -> Callable[P, R]:
    text = "Refuse adapters that name another base than the package's."
    return click.option("--strict", is_flag=True, help=text)(command)


def _point_options(command: Callable[P, R]) -> Callable[..., R]:
    """What gets points and inputs, as `export` and `attach` take it."""

    @click.option(
        "--targets",
        multiple=True,
        metavar="NAME",
        help='What gets points, several times: module names or suffixes; "all-linear" (the default); "all".',
    )
    @click.option("--targets-regex", metavar="EXPR", help="Instead: a regular expression over whole module names.")
    @click.option(
        "--replaceable",
        multiple=True,
        metavar="NAME",
        help='Whole weights an adapter may replace: modules or parameters, several times (default "heads").',
    )
    @click.option(
        "--default-rank",
        type=click.IntRange(0, 1),
        default=0,
        help="1 for execution providers that cannot run rank 0 (DirectML, CoreML).",
    )
    @click.option("--dora", is_flag=True, help="Let points take DoRA's scale, at the cost of a product each.")
    @wraps(command)
    def wrapped(
        *args: Any,
        targets: Sequence[str],
        targets_regex: str | None,
        replaceable: Sequence[str],
        default_rank: int,
        dora: bool,
        **kwargs: Any,
    ) -> R:
        if targets and targets_regex:
            raise click.UsageError("--targets and --targets-regex exclude each other")
        word = targets[0] if len(targets) == 1 and targets[0] in ("all-linear", "all") else None
        chosen: Any = targets_regex or word or (list(targets) or "all-linear")
        heads = "heads" if replaceable in ((), ("heads",)) else list(replaceable)
        options = {"targets": chosen, "replaceable": heads, "default_rank": default_rank, "dora": dora}
        return command(*args, options=options, **kwargs)  # type: ignore[arg-type]

    return wrapped


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", help="What to export it for, as Optimum names it (default: what its config says).")
@click.option(
    "--via",
    type=click.Choice(["optimum", "genai"]),
    help="What makes the graph (default: ONNX Runtime GenAI's builder where it is installed and right for the model).",
)
@click.option(
    "--precision",
    "--dtype",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="fp32",
    help="Of the weights; int8 and int4 need the GenAI builder.",
    show_default=True,
)
@click.option("--block-size", type=int, help="Weights of int8 and int4 that share a scale (default 32).")
@click.option(
    "--accuracy-level",
    type=int,
    help="Arithmetic of int8 and int4: 4 multiplies in int8, the fastest and the default; 1 in float32.",
)
@click.option("--verify/--no-verify", default=True, help="Compare with PyTorch at the end.", show_default=True)
@_point_options
@_json_option
def export(
    model: str,
    out: Path,
    task: str | None,
    via: str | None,
    precision: str,
    block_size: int | None,
    accuracy_level: int | None,
    verify: bool,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Export a checkpoint folder or hub id MODEL to a package OUT.

    \b
    Example:  onnx-lora export ./SmolLM2-135M smollm --precision int4
    """
    from onnx_lora.exporter import export as run_export

    options |= {"task": task, "via": via, "precision": precision, "verify": verify}
    options |= {"block_size": block_size, "accuracy_level": accuracy_level}
    with report.progress("exporting") as progress:
        package = run_export(model, out, progress=progress, **options)
    report.show(report.package_facts(package), as_json=as_json)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Tell modules apart by these weights.")
@_point_options
@_json_option
def attach(file: Path, out: Path, checkpoint: Path | None, options: dict[str, Any], as_json: bool) -> None:
    """Give an existing ONNX FILE (or a folder of them) its injection points; the package goes to OUT.

    \b
    Example:  onnx-lora attach model.onnx package --targets q_proj --targets v_proj
    """
    from onnx_lora.exporter import attach as run_attach

    with report.progress("attaching") as progress:
        package = run_attach(file, out, checkpoint=checkpoint, progress=progress, **options)
    report.show(report.package_facts(package), as_json=as_json)


@cli.command()
@click.argument("adapter", type=click.Path(path_type=Path), nargs=-1, metavar="[ADAPTER]")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--adapter", "adapters", multiple=True, metavar="PATH[:WEIGHT]", help="Instead of ADAPTER; several are blended."
)
@click.option("--package", type=click.Path(path_type=Path), help="The package that it is for; what needs one says so.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(list(FORMATS)),
    help="Default: what OUT ends with; a PEFT folder where it ends with nothing.",
)
@click.option(
    "--initial",
    type=click.Path(path_type=Path),
    help="The PEFT folder of ADAPTER before its training (PiSSA, OLoRA, CorDA, LoRA-GA).",
)
@_unproven_option
@_strict_option
@_json_option
def convert(
    adapter: Sequence[Path],
    out: Path,
    adapters: Sequence[str],
    package: Path | None,
    kind: AdapterFormat | None,
    initial: Path | None,
    allow_unproven: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER, or a blend of several, in another format: ready to be fed to a package, or for other tools.

    \b
    Example:  onnx-lora convert adapters/sql sql.onnx_adapter --package smollm
              onnx-lora convert --adapter sql:0.7 --adapter polite:0.3 both.safetensors --package smollm
              onnx-lora convert style.safetensors style-peft --package sd15
    """
    if len(adapter) + bool(adapters) != 1:
        raise click.UsageError("give one ADAPTER before OUT, or --adapter once or more")
    chosen = _format(out, kind)
    opened = None if package is None else Package.open(package, allow_unproven=allow_unproven)
    weighted = [(path, 1.0) for path in adapter] or list(map(_weighted, adapters))
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        facts = _convert_one(weighted[0][0], out, chosen, opened, initial, strict=strict)
    else:
        if opened is None or initial is not None:
            raise InputError("a blend must have --package, which its adapters fit, and no --initial", path=out)
        parts = [(bind(read_adapter(path), opened, strict=strict), weight) for path, weight in weighted]
        bound = blended(parts, name=out.stem)
        write_adapter(bound, out, format=chosen, package=opened)
        facts = report.coverage_facts(bound)
    report.show(facts | {"written": str(out)}, as_json=as_json)


def _convert_one(
    path: Path, out: Path, kind: AdapterFormat, package: Package | None, initial: Path | None, *, strict: bool
) -> dict[str, Any]:
    adapter = read_adapter(path, initial=initial)
    if package is None:
        write_adapter(adapter, out, format=kind)
        return report.adapter_facts(adapter)
    bound = bind(adapter, package, strict=strict)
    write_adapter(bound if kind in ("safetensors", "onnx_adapter") else adapter, out, format=kind, package=package)
    return report.coverage_facts(bound)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--package", type=click.Path(path_type=Path), help="Show what an adapter does to this package.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw how far it moves each weight of the package; and print it."
)
@_strict_option
@_json_option
def inspect(path: Path, package: Path | None, plot: Path | None, strict: bool, as_json: bool) -> None:
    """Show what a package or an adapter at PATH holds: points, ranks, sizes, coverage.

    \b
    Example:  onnx-lora inspect adapters/sql --package smollm --plot heat.png
    """
    if plot is not None and package is None:
        raise click.UsageError("--plot shows what an adapter does to a package; give --package")
    heat = None
    if package is None and (path / MANIFEST).is_file():
        facts = report.package_facts(Package.open(path), full=True)
    elif package is None:
        facts = report.adapter_facts(read_adapter(path))
    else:
        opened = Package.open(package, allow_unproven=True)  # to be told of it
        adapter = read_adapter(path)
        bound = bind(adapter, opened, strict=strict)
        facts = report.adapter_facts(adapter) | report.coverage_facts(bound, opened)
        if plot is not None:
            moved = effects(bound, opened)
            heat = Heat.of(f"{bound.name}: how far it moves each weight, ‖ΔW‖ / ‖W0‖", moved)
            with _new_file(plot, PICTURES) as temporary:
                heat.draw(temporary)
            facts |= {"effect": dict(moved), "written": str(plot)} if as_json else {"written": str(plot)}
    report.show(facts, as_json=as_json)
    if heat is not None and not as_json:
        report.show_heat(heat)


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--input", "feeds", type=click.Path(path_type=Path), required=True, help="An .npz file: inputs by name.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="An .npz file: outputs by name.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=PATH[:WEIGHT]", help="Several are blended.")
@click.option("--rows", metavar="NAME,NAME,...", help='One adapter per row of the batch; "-" is the base.')
@click.option("--graph", help="Which graph, where the package has several.")
@_unproven_option
@_strict_option
@_json_option
def run(
    package: Path,
    feeds: Path,
    output: Path,
    adapters: Sequence[str],
    rows: str | None,
    graph: str | None,
    allow_unproven: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Run PACKAGE once on the inputs of an .npz file.

    \b
    Example:  onnx-lora run smollm --input feeds.npz --output out.npz --adapter sql=adapters/sql:0.7
    """
    from onnx_lora.runtime import AdapterSession

    parts = _named(adapters)
    choice = _choice(parts, rows)
    with _new_file(output, (".npz",)) as temporary:
        session = AdapterSession(Package.open(package, allow_unproven=allow_unproven), graph=graph)
        for name, (path, _) in parts.items():
            session.load_adapter(name, path, strict=strict)
        values = session.run(None, _read_feeds(feeds), adapter=choice)
        results = dict(zip([value.name for value in session.get_outputs()], values, strict=True))
        np.savez(temporary, **results)
    shapes = {name: value.shape for name, value in results.items()}
    report.show({"outputs": shapes, "written": str(output)}, as_json=as_json)


def _sampling_options(command: Callable[P, R]) -> Callable[..., R]:
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


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, metavar="TEXT", help="Several make one batch.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=PATH[:WEIGHT]", help="Several are blended.")
@click.option("--rows", metavar="NAME,NAME,...", help='One adapter per prompt; "-" is the base.')
@click.option("--chat", is_flag=True, help="A prompt is what a user says: apply the package's chat template.")
@click.option("--graph", help="Which graph, where the package has several.")
@_unproven_option
@_sampling_options
@_strict_option
@_json_option
def generate(
    package: Path,
    prompts: Sequence[str],
    adapters: Sequence[str],
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

    parts = _named(adapters)
    choice = _choice(parts, rows)
    given = [Chat([{"role": "user", "content": prompt}]) if chat else prompt for prompt in prompts]
    generator = TextGenerator(Package.open(package, allow_unproven=allow_unproven), graph=graph)
    for name, (path, _) in parts.items():
        generator.load_adapter(name, path, strict=strict)
    clock = report.Clock()
    with generator.stream(given, adapter=choice, sampling=sampling) as stream:
        for piece in stream:
            clock.tick()
            if len(prompts) == 1 and not as_json:
                report.show_piece(piece.text)
    report.show_generations(prompts, stream.results, clock, as_json=as_json)


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--adapter", "adapters", multiple=True, required=True, metavar="PATH[:WEIGHT]", help="Several are blended."
)
@click.option("--graph", help="Which graph, where the package has several (default: all).")
@click.option("--requantize", is_flag=True, help="Fold into quantized weights too, and say what rounding cost.")
@click.option("--source", type=click.Path(path_type=Path), help="The float package that PACKAGE was quantized from.")
@_unproven_option
@_strict_option
@_json_option
def fold(
    package: Path,
    out: Path,
    adapters: Sequence[str],
    graph: str | None,
    requantize: bool,
    source: Path | None,
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
    leave = Requantize(None if source is None else Package.open(source)) if requantize else None
    opened = Package.open(package, allow_unproven=allow_unproven)
    parts = [(bind(read_adapter(path), opened, strict=strict), weight) for path, weight in map(_weighted, adapters)]
    blend(parts)  # says what cannot be blended before anything is copied
    with report.progress("folding") as progress:
        fold_to(
            opened,
            parts,
            out,
            graph=graph,
            requantize=leave,
            progress=lambda done, total: progress("fold", done, total),
        )
    notes = [f"{bound.name}: {note}" for bound, _ in parts for note in bound.coverage.notes]
    facts: dict[str, Any] = {"folded": [bound.name for bound, _ in parts], "notes": notes, "written": str(out)}
    report.show(facts | report.rounding_facts(leave), as_json=as_json)


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bits", type=click.IntRange(2, 8), default=4, help="4 or 8.", show_default=True)
@click.option(
    "--method",
    type=click.Choice(["blocks", "dynamic"]),
    default="blocks",
    help="Scales by block (MatMulNBits), or 8 bits with one scale a weight (MatMulInteger).",
    show_default=True,
)
@click.option("--block-size", type=int, default=32, help="Weights that share a scale.", show_default=True)
@click.option("--accuracy-level", type=int, default=4, help="4 multiplies in int8, 1 in float32.", show_default=True)
@_json_option
def quantize(
    package: Path,
    out: Path,
    bits: int,
    method: Literal["blocks", "dynamic"],
    block_size: int,
    accuracy_level: int,
    as_json: bool,
) -> None:
    """Quantize the weights of the float package PACKAGE; OUT has the same points, and takes the same adapters.

    \b
    Example:  onnx-lora quantize smollm smollm-int4 --bits 4
    """
    from onnx_lora.exporter.quantization import Method
    from onnx_lora.exporter.quantization import quantize as run_quantize

    with report.progress("quantizing") as progress:
        result = run_quantize(package, out, method=Method(method, bits, block_size, accuracy_level), progress=progress)
    report.show(report.package_facts(result), as_json=as_json)


@cli.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--reference", required=True, metavar="CHECKPOINT", help="The checkpoint it was exported from.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A PEFT folder (default: random adapters).")
@_json_option
def verify(package: Path, reference: str, adapter: Path | None, as_json: bool) -> None:
    """Compare PACKAGE with PyTorch and PEFT: largest difference per output.

    Without --adapter, unproven points that agree are written down as proven.

    \b
    Example:  onnx-lora verify smollm --reference ./SmolLM2-135M --adapter adapters/sql
    """
    from onnx_lora.exporter.verification import verify as run_verify

    opened = Package.open(package, allow_unproven=True)
    tensors = None if adapter is None else _verifiable(adapter, opened)
    with report.progress("verifying"):
        comparisons = run_verify(opened, reference, adapter=adapter, tensors=tensors)
    now = Package.open(package)
    facts = report.verification_facts(comparisons)
    if opened.unproven:
        facts |= {"proven_now": len(opened.unproven) - len(now.unproven), "unproven": report.by_reason(now.unproven)}
    report.show(facts, as_json=as_json)


def _verifiable(path: Path, package: Package) -> Mapping[str, Any]:
    """An adapter that PEFT loads too, as graph inputs.

    Raises InputError: it is no PEFT folder. BindError: it does not fit, or only folds.
    """
    adapter = read_adapter(path)
    if adapter.origin.format != "peft":
        raise InputError(
            "is compared with what PEFT loads, and must be a PEFT folder; onnx-lora convert writes one", path=path
        )
    bound = bind(adapter, package)
    refuse_fold_only(bound, bound.coverage.fold_only)
    return bound.tensors


@cli.command()
@click.option("--text", multiple=True, help="Your own sentence, several times.")
@click.option("--prompt", help="Your own beginning, for the model that writes.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep the first part's package here.")
@_json_option
def demo(text: Sequence[str], prompt: str | None, keep: Path | None, as_json: bool) -> None:
    """Four tasks on one small model, switched, mixed, folded; then a tiny writer under four adapters at once.

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
        report.show(asdict(result) | {"writer": asdict(written)}, as_json=True)
    else:
        report.show_writer(written)


def _format(out: Path, kind: AdapterFormat | None) -> AdapterFormat:
    """What to write to `out`: `kind`, or the first format whose names end so."""
    fitting = [name for name, suffix in FORMATS.items() if suffix == out.suffix]
    if kind is None and fitting:
        return fitting[0]
    if kind is None:
        ends = ", ".join(dict.fromkeys(suffix for suffix in FORMATS.values() if suffix))
        raise InputError(f"must end with {ends} or nothing (a folder), or --format must say what to write", path=out)
    if FORMATS[kind] and not out.suffix:
        raise InputError(f"--format {kind} is a file whose name ends with {FORMATS[kind]}", path=out)
    if out.suffix and fitting and kind not in fitting:
        raise InputError(f"--format {kind} contradicts the name, which says {fitting[0]}; change one of them", path=out)
    return kind


def _named(adapters: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """Paths and weights by name, of texts like `NAME=PATH:WEIGHT`."""
    parts = {}
    for text in adapters:
        name, equals, place = text.partition("=")
        if not equals or not name or not place:
            raise click.UsageError(f"--adapter must look like NAME=PATH or NAME=PATH:WEIGHT, and is {text!r}")
        if name in parts:
            raise click.UsageError(f"--adapter must name every adapter differently, and names {name!r} twice")
        parts[name] = _weighted(place)
    return parts


def _choice(parts: Mapping[str, tuple[Path, float]], rows: str | None) -> Any:
    """What `--adapter` and `--rows` ask for together."""
    weights = {name: weight for name, (_, weight) in parts.items()}
    if rows is None:
        return weights or None
    names = [row.strip() for row in rows.split(",")]
    return [None if name == "-" else {name: weights.get(name, 1.0)} for name in names]


def _weighted(text: str) -> tuple[Path, float]:
    """`PATH` or `PATH:WEIGHT`. What follows the last colon is a weight only if it is a number."""
    place, colon, weight = text.rpartition(":")
    if colon and place:
        try:
            return Path(place), float(weight)
        except ValueError:
            if not Path(text).exists():
                raise InputError(
                    f"--adapter must hold PATH or PATH:WEIGHT; {weight!r} is not a weight, and {text!r} is no path"
                ) from None
    return Path(text), 1.0


def _read_feeds(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.is_file():
        raise FeedError("there is no such file", path=path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise FeedError("must be an .npz file, of inputs by name, and holds one array", path=path)
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise unread(error, path, FeedError, "give an .npz file") from error
    except Exception as error:  # of a damaged archive: ValueError, EOFError, KeyError, zlib's, tokenize's and more
        raise FeedError(f"must be an .npz file of plain arrays: {error}", path=path) from error


@contextmanager
def _new_file(path: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """What `staged_place` gives, for a path that ends as it must. Raises InputError: it does not."""
    if path.suffix not in suffixes:
        raise InputError(f"the output must end with {' or '.join(suffixes)}", path=path)
    with staged_place(path) as place:
        yield place
