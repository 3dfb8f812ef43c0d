"""The registry of formats: our own and their table in the docs, and those that other distributions bring.

With --write-docs the table is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_lora
from onnx_lora import read_adapter
from onnx_lora.adapters.formats.format import AdapterFormat
from onnx_lora.adapters.formats.registry import find_format, format_names
from onnx_lora.adapters.write import FORMATS, write_adapter
from onnx_lora.errors import InputError
from tests.adapters.building import PackageBuilder, adapter, delta, numbers, peft_folder

ROOT = Path(onnx_lora.__file__).parent.parent
DOCS = ROOT / "docs" / "formats.md"

OWN = {"comfyui", "safetensors", "onnx_adapter", "peft", "kohya", "cloneofsimo", "diffusers", "mlx", "gguf"}


# --- our own -----------------------------------------------------------------------------------


def test_the_table_of_the_docs_is_that_of_the_formats(request: pytest.FixtureRequest) -> None:
    lines = ["| format | `--format` | recognised by | scale | refused by name |", "|---|---|---|---|---|"]
    for name in format_names():
        own = find_format(name)
        written = f"`{name}`" if own.can_write else "only read"
        lines.append(f"| {own.row.title} | {written} | {own.row.recognised_by} | {own.row.scale} | {own.row.refused} |")
    text = DOCS.read_text("utf-8")
    before, _, rest = text.partition("<!-- formats -->\n")
    after = rest.partition("<!-- /formats -->")[2]
    table = "\n".join(lines)
    wanted = f"{before}<!-- formats -->\n{table}\n<!-- /formats -->{after}"
    if request.config.getoption("--write-docs"):
        DOCS.write_text(wanted, "utf-8")
    assert DOCS.read_text("utf-8") == wanted, "the table is another now: write it with `make docs`"


def test_every_format_has_the_name_of_its_line() -> None:
    assert set(format_names()) == OWN
    for name in format_names():
        assert find_format(name).format.name == name


def test_every_file_of_a_format_is_in_the_registry() -> None:
    """A file with a `FORMAT` that no line names would never be asked."""
    folder = ROOT / "onnx_lora" / "adapters" / "formats"
    with_format = {path.stem for path in folder.rglob("*.py") if "\nFORMAT = " in path.read_text("utf-8")}
    homes = {type(find_format(name).format).__module__.rpartition(".")[2] for name in format_names()}
    assert with_format == homes


def test_what_can_be_written_is_what_has_a_writer() -> None:
    assert set(FORMATS) == OWN - {"cloneofsimo", "comfyui"}
    assert {name: ending for name, ending in FORMATS.items() if not ending} == {"peft": "", "mlx": ""}
    assert "cloneofsimo" not in FORMATS
    assert isinstance(find_format("peft").format, AdapterFormat)


def test_a_format_that_is_only_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be one of safetensors, .* and is 'cloneofsimo'"):
        write_adapter(adapter({"m.q": delta(4, 6)}), tmp_path / "x.safetensors", format="cloneofsimo")


# --- other distributions' ----------------------------------------------------------------------


def install(site: Path, name: str, code: str, entry_points: Mapping[str, str]) -> None:
    """A distribution as pip leaves it: one module, and what it declares."""
    info = site / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = [f"{key} = {value}" for key, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[onnx_lora.formats]", *lines, ""]))


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that finds what was installed."""
    start = f"import sys; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]\n"
    if len(command) > 1:
        code = f"import sys; from onnx_lora.cli import main; sys.argv = {['onnx-lora', *command]!r}; main()"
    else:
        code = command[0]
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)


def own_format() -> str:
    """The code of "Your own format" in the docs."""
    section = DOCS.read_text("utf-8").partition("## Your own format")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def text_file(path: Path, **more: Any) -> Path:
    module = {"alpha": 4, "a": numbers(2, 4).tolist(), "b": numbers(6, 2).tolist()} | more
    path.write_text(json.dumps({"lora": {"m.q": module}}, separators=(",", ":")))
    return path


def read_code(path: Path) -> str:
    """Reads, and says what came of it."""
    return f"""
from onnx_lora import OnnxLoraError, read_adapter
try:
    adapter = read_adapter({str(path)!r})
except OnnxLoraError as error:
    print(type(error).__name__, error)
else:
    print(adapter.origin.format, adapter.name, list(adapter.deltas), [delta.scale for delta in adapter.deltas.values()])
"""


def test_a_format_of_another_distribution_is_read_converted_and_listed(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "text_format", own_format(), {"text": "text_format:FORMAT"})
    file = text_file(tmp_path / "sql.loratext")
    assert run(site, read_code(file)).stdout == "text sql ['m.q'] [2.0]\n"
    peft = peft_folder(tmp_path / "peft", {"m.q.lora_A.weight": numbers(2, 4), "m.q.lora_B.weight": numbers(6, 2)})
    written = tmp_path / "again.loratext"
    done = run(site, "convert", str(peft), str(written))
    assert done.returncode == 0, done.stderr
    saved = json.loads(written.read_text())["lora"]["m.q"]
    assert np.array_equal(np.array(saved["a"], "f4"), read_adapter(peft).deltas["m.q"].a)
    shown = run(site, "convert", "--help").stdout
    assert "gguf|text]" in re.sub(r"\s", "", shown)
    refused = run(site, "convert", str(peft), str(tmp_path / "x"), "--format", "none")
    assert "'gguf', 'text'" in refused.stderr


def test_what_another_format_refuses_is_told_by_module(tmp_path: Path) -> None:
    install(tmp_path / "site", "text_format", own_format(), {"text": "text_format:FORMAT"})
    file = text_file(tmp_path / "x.loratext", b=[[1.0]])
    said = run(tmp_path / "site", read_code(file)).stdout
    assert said.startswith("AdapterFileError")
    assert "m.q: the factors must be" in said
    file.write_text('{"lora":{"m.q"')
    assert "is cut off, damaged, or of another format" in run(tmp_path / "site", read_code(file)).stdout


BASE = """
from onnx_lora.adapters import Adapter, Origin
from onnx_lora.adapters.formats import Row
class Format:
    name, ending, row = "text", ".loratext", Row("", "", "", "")
    def recognises(self, place): return place.path.suffix == ".loratext"
    def read(self, place, name): return Adapter("a", {}, {}, Origin("", "", "text", "", ""))
    def write_portable(self, adapter, out, package): pass
"""


@pytest.mark.parametrize(
    "code, words",
    [
        ("1 / 0", "'text' of onnx_lora.formats, brought by broken 1.2, must load, and fails with ZeroDivisionError"),
        ("FORMAT = 7", "must be a AdapterFormat, and broken:FORMAT is a int"),
        (f"{BASE}Format.name = property(lambda self: 1 / 0)\nFORMAT = Format()", "fails with ZeroDivisionError"),
        (f"{BASE}FORMAT = Format()\nFORMAT.name = 'peft'", "must be called as its entry point is, and calls itself"),
        (f"{BASE}Format.recognises = lambda self, place: place.nothing\nFORMAT = Format()", "fail, and does with Attr"),
        (f"{BASE}Format.recognises = lambda self, place: 1\nFORMAT = Format()", "must give a bool, and gives a int"),
        (f"{BASE}Format.read = lambda self, place, name: {{}}\nFORMAT = Format()", "give a Adapter, and gives a dict"),
        (f"{BASE}Format.read = lambda self, place: {{}}\nFORMAT = Format()", "must not fail, and does with TypeError"),
        (
            f"{BASE}Format.read = lambda *_: Adapter('a', {{'m': 1}}, {{}}, Origin('', '', 'text', '', ''))\n"
            "FORMAT = Format()",
            "must give deltas and replacements by name, and gives a int",
        ),
        (
            f"{BASE}Format.read = lambda *_: Adapter('a', {{}}, {{}}, Origin('', '', 'safetensors', '', ''))\n"
            "FORMAT = Format()",
            "must give an adapter of its own format, and gives one of 'safetensors'",
        ),
    ],
)
def test_a_broken_distribution_is_named(tmp_path: Path, code: str, words: str) -> None:
    install(tmp_path / "site", "broken", code, {"text": "broken:FORMAT"})
    (tmp_path / "x.loratext").write_text("{}")
    said = run(tmp_path / "site", read_code(tmp_path / "x.loratext")).stdout
    assert said.startswith("PluginError ")
    assert words in said
    assert "brought by broken 1.2" in said


def test_a_format_that_writes_nothing_is_named(tmp_path: Path) -> None:
    install(tmp_path / "site", "broken", f"{BASE}FORMAT = Format()", {"text": "broken:FORMAT"})
    done = run(tmp_path / "site", "convert", str(peft_folder(tmp_path / "a")), str(tmp_path / "x.loratext"))
    assert done.returncode == 3
    assert "brought by broken 1.2, must write the file or folder" in done.stderr
    assert not (tmp_path / "x.loratext").exists()


@pytest.mark.parametrize(
    "fails, code, words",
    [
        ("OSError(28, 'No space left on device')", 3, "error: the disk is full"),
        (
            "ValueError('odd')",
            3,
            "'text', brought by broken 1.2, must not fail, and does with ValueError: odd",
        ),
    ],
)
def test_half_a_file_is_not_left(tmp_path: Path, fails: str, code: int, words: str) -> None:
    """A full disk is nobody's fault."""
    writer = f"def write(self, adapter, out, package):\n    out.write_text('half')\n    raise {fails}\n"
    install(
        tmp_path / "site",
        "broken",
        f"{BASE}{writer}Format.write_portable = write\nFORMAT = Format()",
        {"text": "broken:FORMAT"},
    )
    done = run(tmp_path / "site", "convert", str(peft_folder(tmp_path / "a")), str(tmp_path / "x.loratext"))
    assert done.returncode == code
    assert words in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "site"]


def test_a_name_that_is_taken_twice_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        install(tmp_path / "site", name, f"{BASE}FORMAT = Format()", {"text": f"{name}:FORMAT"})
    (tmp_path / "x.loratext").write_text("{}")
    said = run(tmp_path / "site", read_code(tmp_path / "x.loratext")).stdout
    assert "must be brought by one distribution, and is by one 1.2 and by two 1.2" in said


def test_our_own_format_keeps_its_name(tmp_path: Path) -> None:
    """Whoever takes it is not used, and named where a file is nobody's."""
    install(tmp_path / "site", "greedy", f"{BASE}FORMAT = Format()\nFORMAT.name = 'peft'", {"peft": "greedy:FORMAT"})
    install(tmp_path / "site", "text_format", own_format(), {"text": "text_format:FORMAT"})
    assert run(tmp_path / "site", read_code(peft_folder(tmp_path / "a"))).stdout.startswith("peft a ")
    assert run(tmp_path / "site", read_code(text_file(tmp_path / "sql.lt"))).stdout.startswith("text sql ")
    (tmp_path / "x.loratext").write_text("{}")
    said = run(tmp_path / "site", read_code(tmp_path / "x.loratext")).stdout
    assert said.startswith("AdapterFileError ")
    assert "'peft' of onnx_lora.formats, brought by greedy 1.2, is not used: the name is onnx-lora's own" in said
    done = run(tmp_path / "site", "convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "peft")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "damage", [b"no section", b"[console_scripts]\nno equals sign\n", b"\xff\xfe\x00", b"[x]\n=\n"]
)
def test_damage_of_an_unrelated_distribution_breaks_nothing(tmp_path: Path, damage: bytes) -> None:
    install(tmp_path / "site", "text_format", own_format(), {"text": "text_format:FORMAT"})
    (tmp_path / "site" / "unrelated-1.0.dist-info").mkdir()
    (tmp_path / "site" / "unrelated-1.0.dist-info" / "entry_points.txt").write_bytes(damage)
    assert run(tmp_path / "site", read_code(peft_folder(tmp_path / "a"))).stdout.startswith("peft a ")
    assert run(tmp_path / "site", read_code(text_file(tmp_path / "sql.lt"))).stdout.startswith("text sql ")
    (tmp_path / "x").write_text("{}")
    assert run(tmp_path / "site", read_code(tmp_path / "x")).stdout.startswith("AdapterFileError ")


def test_of_a_distribution_that_lies_on_the_path_twice_the_first_counts(tmp_path: Path) -> None:
    install(tmp_path / "old", "text_format", "1 / 0", {"text": "text_format:FORMAT", "gone": "text_format:FORMAT"})
    install(tmp_path / "site", "text_format", own_format(), {"text": "text_format:FORMAT"})
    metadata = tmp_path / "old" / "text_format-1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.2", "0.9"))
    code = f"sys.path.append({str(tmp_path / 'old')!r})\n" + read_code(text_file(tmp_path / "sql.lt"))
    assert run(tmp_path / "site", code).stdout.startswith("text sql ")


def test_a_file_that_two_formats_claim_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        install(tmp_path / "site", name, f"{BASE}FORMAT = Format()\nFORMAT.name = {name!r}", {name: f"{name}:FORMAT"})
    (tmp_path / "x.loratext").write_text("{}")
    said = run(tmp_path / "site", read_code(tmp_path / "x.loratext")).stdout
    assert "must be of one format, and is claimed by 'one' of one 1.2 and 'two' of two 1.2" in said


def test_our_own_files_are_read_beside_a_broken_distribution(tmp_path: Path) -> None:
    greedy = f"{BASE}Format.recognises = lambda self, place: True\nFORMAT = Format()"
    install(tmp_path / "site", "greedy", greedy, {"text": "greedy:FORMAT"})
    install(tmp_path / "site", "broken", "1 / 0", {"other": "broken:FORMAT"})
    assert run(tmp_path / "site", read_code(peft_folder(tmp_path / "a"))).stdout.startswith("peft a ")
    done = run(tmp_path / "site", "convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "mlx")
    assert done.returncode == 0, done.stderr


def test_what_a_file_is_its_mark_says_and_not_its_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    package = PackageBuilder(tmp_path / "package").point("m.q", 4, 6).open()
    file = write_adapter(
        adapter({"m.q": delta(4, 6)}), tmp_path / "x.onnx_adapter", format="onnx_adapter", package=package
    )
    for name in ("x.gguf", "x.safetensors", "x"):
        again = read_adapter(file.rename(tmp_path / name))
        file = tmp_path / name
        assert again.origin.format == "onnx_adapter"
