"""The command line: which commands there are, and how each of them ends.

Results go to stdout (tables, or JSON with `--json`), progress and errors to stderr. Exit codes: 0 done,
1 a fault of ours, 2 wrong input, 3 the world failed (missing package, full disk), 4 a verification failed, 130
interrupted, 143 and 129 told to end (SIGTERM, SIGHUP)."""

from __future__ import annotations

import io
import json
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import click

from onnx_lora import __version__
from onnx_lora.boundary import translate
from onnx_lora.commands.words import error_in_options, in_options
from onnx_lora.errors import InternalError, OnnxLoraError, printable
from onnx_lora.results import ErrorResult, as_json

__all__ = ["COMMANDS", "cli", "main"]

_INTERRUPTED = 130
_STOPPED = "interrupted; nothing half done is left"

# Of a fault of ours, to be reported whole.
_TRACEBACK_LIMIT = 20_000  # characters


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a command is defined, and what the list of commands says of it: the first sentence of its help, which a
    test compares."""

    module: str
    says: str

    def load(self, name: str) -> click.Command:
        command: click.Command = getattr(import_module(f"onnx_lora.commands.{self.module}"), name)
        return command


# A command's libraries are loaded when it is asked for, and none of them for the list.
COMMANDS: Mapping[str, _Entry] = {
    "attach": _Entry("making", "Give an existing ONNX FILE (or a folder of them) its injection points."),
    "convert": _Entry("adapters", "Write ADAPTER, or a blend of several, in another format."),
    "demo": _Entry("running", "Four tasks on one small model, switched, mixed, folded; then a tiny writer."),
    "export": _Entry("making", "Export a checkpoint folder or hub id MODEL to a package OUT."),
    "fold": _Entry("running", "Fold adapters into PACKAGE's weights and write an ordinary model folder OUT."),
    "generate": _Entry("running", "Write on behind prompts."),
    "inspect": _Entry("adapters", "Show what a package, an adapter or a folded model at PATH holds."),
    "measure": _Entry("measuring", "Measure whether an adapter is better folded into PACKAGE or kept apart."),
    "quantize": _Entry("making", "Quantize the weights of the float package PACKAGE."),
    "run": _Entry("running", "Run PACKAGE once on the inputs of an .npz file."),
    "verify": _Entry("making", "Compare PACKAGE, or a folded model, with PyTorch and PEFT."),
}


class _Commands(click.Group):
    """A group whose commands are loaded one by one."""

    def list_commands(self, ctx: click.Context | None) -> list[str]:  # noqa: ARG002 - click's method
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else entry.load(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].says) for name in self.list_commands(ctx)])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
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
        if as_json:
            _echo_error(ErrorResult("Interrupted", _STOPPED, None, (), _INTERRUPTED))
        click.echo(_STOPPED, err=True)
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        if as_json:
            _echo_error(ErrorResult("UsageError", printable(error.format_message()), None, (), error.exit_code))
        said = io.StringIO()
        error.show(said)
        click.echo(printable(said.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the last boundary of all; a traceback is shown of what is no user's
        _end_with(translate(error), error, as_json=as_json)


def _end_with(error: OnnxLoraError, cause: Exception, *, as_json: bool) -> None:
    if as_json:
        _echo_error(error_in_options(ErrorResult.of(error)))
    if isinstance(error, InternalError):
        click.echo(printable("".join(traceback.format_exception(cause)), _TRACEBACK_LIMIT), err=True)
    click.echo(f"error: {in_options(str(error))}", err=True)
    sys.exit(error.exit_code)


def _echo_error(result: ErrorResult) -> None:
    click.echo(json.dumps(as_json(result)))
