"""Commands that make packages and prove them: export, attach, quantize, verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import click

from onnx_lora import report
from onnx_lora.adapters import bind, read_adapter, write_adapter
from onnx_lora.adapters.adapter import refuse_fold_only
from onnx_lora.commands.given import SPELLING, GivenAdapter, adapter_name_option, parse_adapters
from onnx_lora.commands.options import json_option
from onnx_lora.commands.outputs import force_option, output
from onnx_lora.errors import InputError, SeveralAdaptersError
from onnx_lora.exporter.frontends.exporters.registry import EXPORTERS
from onnx_lora.package import Package
from onnx_lora.results import PackageResult, VerifyResult
from onnx_lora.staging import scratch
from onnx_lora.whatis import Thing, what_is

if TYPE_CHECKING:
    from onnx_lora.exporter import Comparison, TriedAdapter

__all__ = ["attach", "export", "quantize", "verify"]

# What these commands write, and `--force` replaces.
_OURS = (Thing.PACKAGE,)

P = ParamSpec("P")
R = TypeVar("R")


def point_options(command: Callable[P, R]) -> Callable[..., R]:
    """What gets points and inputs, as `export` and `attach` take it."""

    @click.option(
        "--targets",
        multiple=True,
        metavar="NAME,...",
        help='What gets points: module names or suffixes, with commas or several times; "all-linear" (default); "all".',
    )
    @click.option("--targets-regex", metavar="EXPR", help="Instead: a regular expression over whole module names.")
    @click.option(
        "--replaceable",
        multiple=True,
        metavar="NAME,...",
        help='Whole weights an adapter may replace: modules or parameters, as --targets (default "heads").',
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
        targets, replaceable = _split(targets), _split(replaceable)
        word = targets[0] if len(targets) == 1 and targets[0] in ("all-linear", "all") else None
        chosen: Any = targets_regex or word or (targets or "all-linear")
        options = {"targets": chosen, "replaceable": replaceable or "heads", "default_rank": default_rank, "dora": dora}
        return command(*args, options=options, **kwargs)  # type: ignore[arg-type]

    return wrapped


def _split(texts: Sequence[str]) -> list[str]:
    """The names in texts like `a,b`. A name with a comma is a matter for --targets-regex."""
    names: list[str] = []
    for text in texts:
        names.extend(name.strip() for name in text.split(","))
    return [name for name in names if name]


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", help="What to export it for, as Optimum names it (default: what its config says).")
@click.option(
    "--via",
    type=click.Choice(list(EXPORTERS)),
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
@point_options
@force_option
@json_option
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
    force: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint folder or hub id MODEL to a package OUT.

    \b
    Example:  onnx-lora export ./SmolLM2-135M smollm --precision int4
    """
    from onnx_lora.exporter import export as run_export

    options |= {"task": task, "via": via, "precision": precision, "verify": verify}
    options |= {"block_size": block_size, "accuracy_level": accuracy_level}
    verified: list[Comparison] = []
    with output(out, force=force, kinds=_OURS) as place, report.progress("exporting") as progress:
        run_export(model, place, progress=progress, verified=verified.extend, **options)
    report.show(PackageResult.of(Package.open(out), verified if verify else None), as_json=as_json)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Tell modules apart by these weights.")
@point_options
@force_option
@json_option
def attach(file: Path, out: Path, checkpoint: Path | None, options: dict[str, Any], force: bool, as_json: bool) -> None:
    """Give an existing ONNX FILE (or a folder of them) its injection points. The package goes to OUT.

    \b
    Example:  onnx-lora attach model.onnx package --targets q_proj --targets v_proj
    """
    from onnx_lora.exporter import attach as run_attach

    with output(out, force=force, kinds=_OURS) as place, report.progress("attaching") as progress:
        run_attach(file, place, checkpoint=checkpoint, progress=progress, **options)
    report.show(PackageResult.of(Package.open(out)), as_json=as_json)


@click.command()
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
@force_option
@json_option
def quantize(
    package: Path,
    out: Path,
    bits: int,
    method: Literal["blocks", "dynamic"],
    block_size: int,
    accuracy_level: int,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize the weights of the float package PACKAGE. OUT has the same points, and takes the same adapters.

    \b
    Example:  onnx-lora quantize smollm smollm-int4 --bits 4
    """
    from onnx_lora.exporter import Method
    from onnx_lora.exporter import quantize as run_quantize

    chosen = Method(method, bits, block_size, accuracy_level)
    with output(out, force=force, kinds=_OURS) as place, report.progress("quantizing") as progress:
        run_quantize(package, place, method=chosen, progress=progress)
    report.show(PackageResult.of(Package.open(out)), as_json=as_json)


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--reference", required=True, metavar="CHECKPOINT", help="The checkpoint it was exported from.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar=SPELLING,
    help="Several are compared one by one; of a folded model all that are in it (default: random adapters).",
)
@click.option(
    "--original",
    "originals",
    multiple=True,
    type=click.Path(path_type=Path),
    help="The PEFT folder that --adapter was converted from, one for each of them: what PEFT loads.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="A file of your own texts, one a line: how often base and adapters say what the float model says there.",
)
@adapter_name_option
@json_option
def verify(
    package: Path,
    reference: str,
    adapters: Sequence[str],
    originals: Sequence[Path],
    text: Path | None,
    adapter_name: str | None,
    as_json: bool,
) -> None:
    """Compare PACKAGE, or a folded model, with PyTorch and PEFT. The largest difference of each output is shown.

    Without --adapter, unproven points that agree are written down as proven.

    \b
    Example:  onnx-lora verify smollm --reference ./SmolLM2-135M --adapter adapters/sql
              onnx-lora verify smollm --reference ./SmolLM2-135M --adapter sql.onnx_adapter --original adapters/sql
              onnx-lora verify sql-folded --reference ./SmolLM2-135M --adapter adapters/sql
    """
    from onnx_lora.exporter import compare_texts
    from onnx_lora.exporter import verify as run_verify

    given = parse_adapters(adapters, adapter_name)
    if originals and len(originals) != len(given):
        raise click.UsageError("--original goes with --adapter, one for each of them")
    texts = () if text is None else _read_lines(text)
    if what_is(package) in (Thing.ONNX, Thing.GENAI):
        if texts:
            raise click.UsageError("--text is for packages; a folded model is compared with its adapters alone")
        comparisons = _verify_folded(package, reference, given, originals)
        report.show(VerifyResult.of(comparisons), as_json=as_json)
        return
    opened = Package.open(package, allow_unproven=True)
    with scratch() as folder:
        tried = [_try_on(opened, one, folder / str(number)) for number, one in enumerate(given)]
        for number, original in enumerate(originals):
            tried[number] = replace(tried[number], folder=original)
        for one in given:
            if one.weight != 1.0:
                raise click.UsageError("a weight is for a folded model; adapters of a package are compared as they are")
        with report.progress("verifying"):
            comparisons = run_verify(opened, reference, adapters=tried)
            agreements = compare_texts(opened, reference, texts, tried) if texts else []
    report.show(VerifyResult.of(comparisons, opened, Package.open(package), agreements), as_json=as_json)


def _read_lines(file: Path) -> list[str]:
    """The lines of a text file that hold something. Raises InputError: it is none, or has none."""
    try:
        lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"must be a text file in UTF-8, one text a line: {error}", path=file) from error
    if not lines:
        raise InputError("must hold texts, one a line, and is empty", path=file)
    return lines


def _try_on(package: Package, given: GivenAdapter, place: Path) -> TriedAdapter:
    """An adapter as graph inputs, and as a PEFT folder: its own, or one that is written to `place`.

    Raises BindError: it does not fit, or only folds. UnsupportedAdapterError: no PEFT folder can hold it.
    """
    from onnx_lora.exporter import TriedAdapter

    adapter = given.read()
    bound = bind(adapter, package)
    refuse_fold_only(bound, bound.coverage.fold_only)
    if adapter.origin.format != "peft" or _is_one_of_several(given.path):
        write_adapter(adapter, place, format="peft", package=package)
        return TriedAdapter(given.label, place, bound.tensors)
    return TriedAdapter(given.label, adapter.origin.path, bound.tensors)


def _is_one_of_several(path: Path) -> bool:
    """Whether one file holds several adapters, of which PEFT loads none."""
    try:
        read_adapter(path)
    except SeveralAdaptersError:
        return (path / "adapter_config.json").is_file()
    return False


def _verify_folded(
    folder: Path, reference: str, given: Sequence[GivenAdapter], originals: Sequence[Path]
) -> Sequence[Comparison]:
    from onnx_lora.exporter import TriedAdapter, verify_folded
    from onnx_lora.runtime import read_folded

    model = read_folded(folder)
    if model is None:
        raise InputError(
            "must be a package, or a folded model that says what it was made of, and its graphs do not: fold it again, "
            "or give ONNX files their points with `attach`",
            path=folder,
        )
    if not given:
        held = ", ".join(f"{one.name}:{one.weight:g}" for one in model.adapters)
        raise InputError(f"is compared with what was folded in ({held}): give that with --adapter", path=folder)
    places = originals or [one.path for one in given]
    tried = [TriedAdapter(one.label, place, weight=one.weight) for one, place in zip(given, places, strict=True)]
    with report.progress("verifying"):
        return verify_folded(model, reference, tried)
