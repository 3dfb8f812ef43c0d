"""What an error, and a report, shows of names that anybody may have chosen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from onnx_lora.errors import AdapterFileError, OnnxLoraError, printable
from onnx_lora.heat import Heat

HOSTILE = "\x1b[2J\x9b31m\u202egnp.exe\udc80\r"


def test_what_steers_a_terminal_is_spelled_out() -> None:
    assert printable(HOSTILE) == r"\x1b[2J\x9b31m\u202egnp.exe\udc80\r"


def test_plain_text_of_any_script_stays_as_it_is() -> None:
    text = "Größe → 中文 שלום 👩\u200d🔬\n\tline"
    assert printable(text) == text
    assert printable("a\nb\tc", one_line=True) == r"a\nb\tc"


def test_a_long_text_keeps_its_beginning_and_its_cure() -> None:
    shown = printable("begin" + "x" * 10**6 + "cure", 300)
    assert shown.startswith("begin")
    assert shown.endswith("cure")
    assert "999,7" in shown
    assert len(shown) < 400


def test_an_error_shows_twenty_problems_and_counts_the_rest() -> None:
    error = OnnxLoraError("wrong", path="file", problems=[f"tensor {index}" for index in range(3432)])
    lines = str(error).splitlines()
    assert lines[:2] == ["file: wrong", "  - tensor 0"]
    assert lines[-1] == "  … and 3,412 more"
    assert len(lines) == 22
    assert len(error.problems) == 3432


def test_an_error_is_small_whatever_a_file_holds() -> None:
    error = OnnxLoraError("m" * 10**7, path="p" * 10**6, problems=["x" * 10**6] * 20_000)
    assert len(str(error)) < 100_000
    assert sum(map(len, error.problems)) < 20_000_000


def test_an_error_cannot_be_steered_by_names() -> None:
    error = OnnxLoraError(f"wrong {HOSTILE}", path=HOSTILE, problems=[f"{HOSTILE}\n  - forged"])
    assert not {"\x1b", "\x9b", "\u202e", "\udc80", "\r"} & set(str(error))
    assert len(str(error).splitlines()) == 2
    assert error.path == HOSTILE  # a program must find the file


def test_a_table_takes_names_for_text() -> None:
    heat = Heat.of("[/bold] \x1b[31m", {"layer.0.[/red]\x1b[0m": 1.0, "$x^$": 2.0})
    console = Console(width=200)
    with console.capture() as capture:
        console.print(heat.table())
    assert "[/bold]" in capture.get()
    assert "\x1b[31m" not in capture.get()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "base_model_name_or_path": HOSTILE}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = [f"base_model.model.q.{HOSTILE[:4]}[/red].lora_{half}.weight" for half in "AB"]
    tensors = {names[0]: np.ones((2, 4), np.float32), names[1]: np.ones((4, 2), np.float32)}
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors))
    return folder


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command_shows_no_control_characters(adapter: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "onnx_lora", "inspect", str(adapter), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = result.stdout + result.stderr
    assert not {"\x1b", "\x9b", "\u202e"} & set(said)
    assert "Traceback" not in said
    if options:
        json.loads(result.stdout)


def test_kinds_of_errors_keep_their_exit_codes() -> None:
    assert AdapterFileError("x").exit_code == 2
