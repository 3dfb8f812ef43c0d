"""Commands on files of adapters: convert, and inspect, which shows packages too."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from onnx_lora import report
from onnx_lora.adapters import bind, convert_all, write_adapter
from onnx_lora.adapters.compose import make_blend
from onnx_lora.adapters.effect import effects
from onnx_lora.adapters.formats.registry import holds_graph_inputs
from onnx_lora.commands.given import SPELLING, GivenAdapter, adapter_name_option, parse_adapters
from onnx_lora.commands.options import json_option, strict_option, unproven_option
from onnx_lora.commands.outputs import force_option, new_file, output
from onnx_lora.commands.words import error_in_options, in_options
from onnx_lora.errors import InputError
from onnx_lora.heat import PICTURES, Heat
from onnx_lora.manifest import MANIFEST
from onnx_lora.package import Package
from onnx_lora.results import (
    AdapterResult,
    BatchEntry,
    BatchResult,
    ConvertResult,
    CoverageResult,
    FoldedResult,
    InspectedAdapter,
    PackageResult,
)
from onnx_lora.whatis import Thing, what_is

__all__ = ["convert", "inspect"]


def _formats() -> Mapping[str, str]:
    """What adapters can be written as, and how the names of its files end."""
    from onnx_lora.adapters.write import FORMATS

    return FORMATS


class _FormatChoice(click.Choice[str]):
    """The formats that adapters can be written in. Those of other distributions are looked up when they are shown, or
    when the one that was given is none of ours."""

    def __init__(self) -> None:
        self.case_sensitive = True

    @property
    def choices(self) -> Sequence[str]:  # type: ignore[override]
        return tuple(_formats())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if value in _formats() else super().convert(value, param, ctx)


@click.command()
@click.argument("adapter", nargs=-1, metavar="[ADAPTER]")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, metavar=SPELLING, help="Instead of ADAPTER; several are blended.")
@adapter_name_option
@click.option(
    "--all",
    "folder",
    type=click.Path(path_type=Path),
    help="Instead of ADAPTER: every adapter in this folder, into the folder OUT; what is up to date is left alone.",
)
@click.option("--package", type=click.Path(path_type=Path), help="The package that it is for; what needs one says so.")
@click.option(
    "--format",
    "kind",
    type=_FormatChoice(),
    help="Default: what OUT ends with; a PEFT folder where it ends with nothing.",
)
@click.option(
    "--initial",
    type=click.Path(path_type=Path),
    help="The PEFT folder of ADAPTER before its training (PiSSA, OLoRA, CorDA, LoRA-GA).",
)
@force_option
@unproven_option
@strict_option
@json_option
def convert(
    adapter: Sequence[str],
    out: Path,
    adapters: Sequence[str],
    adapter_name: str | None,
    folder: Path | None,
    package: Path | None,
    kind: str | None,
    initial: Path | None,
    force: bool,
    allow_unproven: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER, or a blend of several, in another format. OUT is ready to be fed to a
    package, or for other tools.

    \b
    Example:  onnx-lora convert adapters/sql sql.onnx_adapter --package smollm --force
              onnx-lora convert --adapter sql:0.7 --adapter polite:0.3 both.safetensors --package smollm
              onnx-lora convert style.safetensors style-peft --package sd15
              onnx-lora convert --all adapters converted --package smollm --format onnx_adapter
    """
    if folder is not None:
        if adapter or adapters or adapter_name or initial or force:
            raise click.UsageError("--all takes a folder alone, without ADAPTER, --adapter, --initial and --force")
        _convert_folder(folder, out, kind, package, allow_unproven=allow_unproven, strict=strict, as_json=as_json)
        return
    if len(adapter) + bool(adapters) != 1:
        raise click.UsageError("give one ADAPTER before OUT, or --adapter once or more")
    chosen = choose_format(out, kind)
    opened = None if package is None else Package.open(package, allow_unproven=allow_unproven)
    given = parse_adapters([*adapter, *adapters], adapter_name)
    with output(out, force=force, kinds=(Thing.ADAPTER, Thing.FILE)) as place:
        if len(given) == 1 and given[0].weight == 1.0:
            result = _convert_one(given[0], place, chosen, opened, initial, strict=strict)
        else:
            if opened is None or initial is not None:
                raise InputError("a blend must have --package, which its adapters fit, and no --initial", path=out)
            parts = [(bind(one.read(), opened, strict=strict), one.weight) for one in given]
            bound = make_blend(parts, name=out.stem)
            write_adapter(bound, place, format=chosen, package=opened)
            result = ConvertResult(str(out), chosen, None, CoverageResult.of(bound, opened))
    report.show(replace(result, written=str(out)), as_json=as_json)


def _convert_folder(
    folder: Path,
    out: Path,
    kind: str | None,
    package: Path | None,
    *,
    allow_unproven: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Convert what a folder holds; end with the exit code of an adapter that failed."""
    if kind is None:
        raise click.UsageError("--all needs --format, which says what to write into OUT")
    opened = None if package is None else Package.open(package, allow_unproven=allow_unproven)
    with report.progress("converting") as progress:
        converted = convert_all(folder, out, format=kind, package=opened, strict=strict, progress=progress)
    result = BatchResult.of(folder, kind, converted, opened)
    entries: list[BatchEntry] = []
    for entry in result.adapters:
        entries.append(entry if entry.error is None else replace(entry, error=error_in_options(entry.error)))
    report.show(replace(result, adapters=entries), as_json=as_json)
    for adapter in converted.failed:
        click.echo(f"error: {in_options(str(adapter.error))}", err=True)
    sys.exit(result.exit_code)


def _convert_one(
    given: GivenAdapter, out: Path, kind: str, package: Package | None, initial: Path | None, *, strict: bool
) -> ConvertResult:
    adapter = given.read(initial)
    if package is None:
        write_adapter(adapter, out, format=kind)
        return ConvertResult(str(out), kind, AdapterResult.of(adapter), None)
    bound = bind(adapter, package, strict=strict)
    write_adapter(bound if holds_graph_inputs(kind) else adapter, out, format=kind, package=package)
    return ConvertResult(str(out), kind, AdapterResult.of(adapter), CoverageResult.of(bound, package))


def choose_format(out: Path, kind: str | None) -> str:
    """What to write to `out`: `kind`, or the first format whose names end so. Formats of other distributions are looked
    at where none of ours decides. Raises InputError: none fits."""
    endings = _formats()
    if kind is not None and endings[kind] == out.suffix:
        return kind
    fitting = next((name for name in endings if endings[name] == out.suffix), None)
    if kind is None:
        if fitting is not None:
            return fitting
        ends = ", ".join(dict.fromkeys(ending for ending in endings.values() if ending))
        raise InputError(f"must end with {ends} or nothing (a folder), or --format must say what to write", path=out)
    if not out.suffix:
        raise InputError(f"--format {kind} is a file whose name ends with {endings[kind]}", path=out)
    if fitting is not None:
        raise InputError(f"--format {kind} contradicts the name, which says {fitting}; change one of them", path=out)
    return kind


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--package", type=click.Path(path_type=Path), help="Show what an adapter does to this package.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw how far it moves each weight of the package; and print it."
)
@adapter_name_option
@force_option
@strict_option
@json_option
def inspect(
    path: Path,
    package: Path | None,
    plot: Path | None,
    adapter_name: str | None,
    force: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Show what a package, an adapter or a folded model at PATH holds. Points, ranks, sizes and coverage are listed.

    \b
    Example:  onnx-lora inspect adapters/sql --package smollm --plot heat.png
    """
    if plot is not None and package is None:
        raise click.UsageError("--plot shows what an adapter does to a package; give --package")
    if package is None and (path / MANIFEST).is_file():
        report.show(PackageResult.of(Package.open(path)), as_json=as_json)
        return
    if package is None and what_is(path) in (Thing.ONNX, Thing.GENAI) and path.is_dir():
        from onnx_lora.runtime import read_folded

        folded = read_folded(path)
        if folded is not None:
            report.show(FoldedResult.of(folded), as_json=as_json)
            return
    adapter = GivenAdapter(path, chosen=adapter_name).read()
    if package is None:
        report.show(InspectedAdapter(AdapterResult.of(adapter), None, {}, None), as_json=as_json)
        return
    opened = Package.open(package, allow_unproven=True)  # to be told of it
    bound = bind(adapter, opened, strict=strict)
    result = InspectedAdapter(AdapterResult.of(adapter), CoverageResult.of(bound, opened), {}, None)
    if plot is None:
        report.show(result, as_json=as_json)
        return
    moved = effects(bound, opened)
    heat = Heat.of(f"{bound.name}: how far it moves each weight, ‖ΔW‖ / ‖W0‖", moved)
    with new_file(plot, PICTURES, force=force) as temporary:
        heat.draw(temporary)
    report.show(replace(result, effect=dict(moved), written=str(plot)), as_json=as_json)
    if not as_json:
        report.show_heat(heat)
