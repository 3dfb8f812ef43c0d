"""The registry of methods: our own and their table in the docs, and those that other distributions bring.

With --write-docs the table is written."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from onnx_lora.adapters.formats.peft.refused import list_refused
from onnx_lora.adapters.methods import METHODS
from onnx_lora.adapters.methods.method import MERGE
from tests.adapters.building import numbers, peft_folder
from tests.adapters.merging import method_folder
from tests.runtime.tiny import HIDDEN, make_package, weights

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "adapters.md"


def test_the_table_of_the_docs_is_that_of_the_methods(request: pytest.FixtureRequest) -> None:
    lines = ["| `peft_type` or option | how it is applied |", "|---|---|"]
    for name in METHODS.own:
        lines += [f"| {row.option} | {row.applied} |" for row in METHODS[name].docs]
    _compare_table(request, "methods", lines)


def test_the_table_of_what_is_refused_is_that_of_the_methods(request: pytest.FixtureRequest) -> None:
    lines = ["| `peft_type` or option | why | what to do |", "|---|---|---|"]
    for refusal, names in list_refused(METHODS[name] for name in METHODS.own).items():
        quoted = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {quoted} | {refusal.reason} | {refusal.cure} |")
    lines.append(f"| every other `peft_type` (ROAD, WAVEFT, GLORA, …), LoftQ | is not read | {MERGE} |")
    _compare_table(request, "refused", lines)


def _compare_table(request: pytest.FixtureRequest, mark: str, lines: Sequence[str]) -> None:
    """The table between `<!-- mark -->` and `<!-- /mark -->` of the docs; with --write-docs it is written."""
    text = DOCS.read_text("utf-8")
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    after = rest.partition(f"<!-- /{mark} -->")[2]
    table = "\n".join(lines)
    wanted = f"{before}<!-- {mark} -->\n{table}\n<!-- /{mark} -->{after}"
    if request.config.getoption("--write-docs"):
        DOCS.write_text(wanted, "utf-8")
    assert DOCS.read_text("utf-8") == wanted, "the table is another now: write it with `make docs`"


def test_every_method_has_the_name_of_its_line() -> None:
    for name in METHODS.own:
        assert METHODS[name].peft_type == name


def test_every_file_of_a_method_is_in_the_registry() -> None:
    """A file with a `METHOD` that no line names would never be read."""
    folder = ROOT / "onnx_lora" / "adapters" / "methods"
    with_method = {path.stem for path in folder.glob("*.py") if "\nMETHOD = " in path.read_text("utf-8")}
    homes = {METHODS[name].read.__module__.rpartition(".")[2] for name in METHODS.own}
    assert with_method == homes


def install(site: Path, name: str, code: str, entry_points: Mapping[str, str], version: str = "1.2") -> None:
    """A distribution as pip leaves it: one module, and what it declares."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[onnx_lora.methods]", *lines, ""]))


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own that finds what was installed."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )


def own_method() -> str:
    """The code of "Your own method" in the docs."""
    section = DOCS.read_text("utf-8").partition("## Your own method")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_method_of_another_distribution_is_read_bound_and_folded(tmp_path: Path) -> None:
    install(tmp_path / "site", "gain_method", own_method(), {"GAIN": "gain_method:METHOD"})
    make_package(tmp_path / "package")
    gain = numbers(HIDDEN)
    method_folder(tmp_path / "gain", {"layer.up.gain_g": gain}, "GAIN", target_modules=["up"], strength=0.5)
    # The same change as a LoRA: B · A = diag(g / 2) · W0.
    tensors = {"layer.up.lora_A.weight": weights()["W_up"], "layer.up.lora_B.weight": np.diag(gain / 2)}
    peft_folder(tmp_path / "lora", tensors, r=HIDDEN, lora_alpha=HIDDEN, target_modules=["up"])
    done = run(
        tmp_path / "site",
        f"""
import numpy as np
from onnx_lora import AdapterSession, Package, bind, fold, read_adapter
from tests.runtime.tiny import batch
folder = {str(tmp_path)!r}
package = Package.open(f"{{folder}}/package")
adapter = read_adapter(f"{{folder}}/gain")
assert adapter.origin.method == "Gain", adapter.origin
bound = bind(adapter, package)
assert bound.coverage.applied == ("layer.up",)
feeds = batch().feeds
gained = fold(package, bound).run(None, feeds)[0]
same = fold(package, f"{{folder}}/lora").run(None, feeds)[0]
base = AdapterSession(package).run(None, feeds)[0]
print(float(np.abs(gained - same).max()), float(np.abs(gained - base).max()))
""",
    )
    assert done.returncode == 0, done.stderr
    difference, moved = map(float, done.stdout.split())
    assert difference < 1e-5 < 1e-2 < moved


@pytest.mark.parametrize(
    "code, entry_points, words",
    [
        ("1 / 0", {"GAIN": "broken:METHOD"}, "brought by broken 1.2, must load, and fails with ZeroDivisionError"),
        ("", {"GAIN": "broken:METHOD"}, "brought by broken 1.2, must load, and fails with AttributeError"),
        ("", {"GAIN": "nowhere:METHOD"}, "brought by broken 1.2, must load, and fails with ModuleNotFoundError"),
        ("METHOD = 7", {"GAIN": "broken:METHOD"}, "must be a Method, and broken:METHOD is a int"),
        (
            "from onnx_lora.adapters.methods.beft import METHOD",
            {"GAIN": "broken:METHOD"},
            "'GAIN' of another package must have that peft_type, and has 'BEFT'",
        ),
    ],
)
def test_a_broken_distribution_is_named(tmp_path: Path, code: str, entry_points: Mapping[str, str], words: str) -> None:
    install(tmp_path / "site", "broken", code, entry_points)
    method_folder(tmp_path / "gain", {"m.q.gain_g": numbers(4)}, "GAIN")
    assert words in _refusal(tmp_path / "site", tmp_path / "gain")


def test_a_name_that_is_taken_twice_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        install(tmp_path / "site", name, own_method(), {"GAIN": f"{name}:METHOD"})
    method_folder(tmp_path / "a", {"m.q.ia3_l": numbers(4, 1)}, "GAIN")
    said = _refusal(tmp_path / "site", tmp_path / "a")
    assert "must be brought by one distribution, and is by one 1.2 and by two 1.2" in said


def test_our_own_method_keeps_its_name(tmp_path: Path) -> None:
    """Whoever takes it is not used, and named where nobody knows a `peft_type`."""
    install(tmp_path / "site", "greedy", "1 / 0", {"IA3": "greedy:METHOD"})
    install(tmp_path / "site", "gain_method", own_method(), {"GAIN": "gain_method:METHOD"})
    ours = method_folder(tmp_path / "a", {"m.q.ia3_l": numbers(4, 1)}, "IA3")
    theirs = method_folder(tmp_path / "b", {"m.q.gain_g": numbers(4)}, "GAIN", strength=0.5)
    nobodys = method_folder(tmp_path / "c", {"m.q.gain_g": numbers(4)}, "NONE")
    code = f"""
from onnx_lora import UnsupportedAdapterError, read_adapter
print([read_adapter(path).origin.method for path in ({str(ours)!r}, {str(theirs)!r})])
try:
    read_adapter({str(nobodys)!r})
except UnsupportedAdapterError as error:
    print(error)
"""
    done = run(tmp_path / "site", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['IA3', 'Gain']\n")
    assert "'IA3' of onnx_lora.methods, brought by greedy 1.2, is not used: the name is onnx-lora's own" in done.stdout


@pytest.mark.parametrize(
    "reads, words",
    [
        ("1 / 0", "brought by broken 1.2, must not fail, and does with ZeroDivisionError"),
        ("module.nothing", "brought by broken 1.2, must not fail, and does with AttributeError"),
        ("7", "brought by broken 1.2, must give a Contribution, and gives a int"),
    ],
)
def test_a_method_that_fails_while_it_reads_is_named(tmp_path: Path, reads: str, words: str) -> None:
    code = own_method().replace(
        "    return Contribution(change=Gain", f"    return {reads}\n    return Contribution(change=Gain"
    )
    install(tmp_path / "site", "broken", code, {"GAIN": "broken:METHOD"})
    method_folder(tmp_path / "gain", {"m.q.gain_g": numbers(4)}, "GAIN", strength=0.5)
    assert words in _refusal(tmp_path / "site", tmp_path / "gain")


def test_what_a_method_of_another_distribution_refuses_is_told_by_module(tmp_path: Path) -> None:
    install(tmp_path / "site", "gain_method", own_method(), {"GAIN": "gain_method:METHOD"})
    folder = method_folder(tmp_path / "gain", {"m.q.gain_g": numbers(4)}, "GAIN", strength="much")
    code = f"""
from onnx_lora import AdapterFileError, read_adapter
try:
    read_adapter({str(folder)!r})
except AdapterFileError as error:
    print(error)
"""
    assert "m.q: strength of the config must be a number" in run(tmp_path / "site", code).stdout


def test_other_methods_are_read_beside_a_broken_distribution(tmp_path: Path) -> None:
    install(tmp_path / "site", "broken", "1 / 0", {"GAIN": "broken:METHOD"})
    folder = method_folder(tmp_path / "a", {"m.q.ia3_l": numbers(4, 1)}, "IA3")
    done = run(
        tmp_path / "site", f"from onnx_lora import read_adapter; print(read_adapter({str(folder)!r}).origin.method)"
    )
    assert done.stdout == "IA3\n", done.stderr


def _refusal(site: Path, folder: Path) -> str:
    """The text of the PluginError with which an adapter is refused."""
    done = run(
        site,
        f"""
from onnx_lora import read_adapter
from onnx_lora.errors import PluginError
try:
    read_adapter({str(folder)!r})
except PluginError as error:
    print(error)
""",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
