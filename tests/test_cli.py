"""The command line as people and machines use it: results, errors, exit codes, nothing left behind."""

from __future__ import annotations

import ast
import contextlib
import errno
import inspect
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_lora
from onnx_lora import Package, read_adapter, report, write_adapter
from onnx_lora.cli import COMMANDS, main
from onnx_lora.commands.given import GivenAdapter, parse_adapter
from onnx_lora.commands.options import read_feeds
from onnx_lora.commands.words import OPTIONS, in_options
from onnx_lora.errors import FeedError, InputError
from onnx_lora.manifest import MANIFEST
from tests.support.json_schema import check_result
from tests.support.models import make_adapter, make_model
from tests.support.numbers import assert_close

Make = Callable[[str], Path]
IDS = np.array([[5, 17, 42, 8], [3, 3, 60, 9]], np.int64)
FEEDS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}
IN_OUT = ["--input", "feeds.npz", "--output", "o.npz"]
ONNX = ["--format", "onnx_adapter"]


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def _call(*arguments: object, folder: Path) -> Result:
    """What `onnx-lora` does with these arguments in `folder`, in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["onnx-lora", *map(str, arguments)])
        try:
            main()
            code: Any = 0
        except SystemExit as leaving:
            code = leaving.code
    return Result(int(code or 0), stdout.getvalue(), stderr.getvalue())


def _json(*arguments: object, folder: Path) -> Any:
    """A command's result, which must be what the schema says."""
    result = _call(*arguments, "--json", folder=folder)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    body = json.loads(line)
    check_result(str(arguments[0]), body)
    return body


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, packages: Make) -> Path:
    """A folder with a package `bert`, adapters `plain` (no head) and `head`, and inputs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "bert").symlink_to(packages("bert"))
    make_adapter(make_model("bert"), folder / "head", r=4, target_modules=["query"])
    make_adapter(make_model("bert"), folder / "plain", r=2, target_modules=["value"], modules_to_save=None, seed=3)
    np.savez(folder / "feeds.npz", **FEEDS)
    return folder


def test_inspect_tells_packages_and_adapters_apart(desk: Path) -> None:
    package = _json("inspect", "bert", folder=desk)
    assert package["points"] == 13
    assert package["replaceable"] == [
        {"name": "classifier.weight", "shape": [2, 32]},
        {"name": "classifier.bias", "shape": [2]},
    ]
    assert len(package["modules"]) == 13
    shown = _json("inspect", "head", "--package", "bert", folder=desk)
    adapter, coverage = shown["adapter"], shown["coverage"]
    assert (adapter["modules"], adapter["ranks"]) == (2, [{"rank": 4, "modules": 2}])
    assert (len(coverage["applied"]), coverage["points"]) == (2, 13)
    assert set(coverage["replaced"]) == {"classifier.bias", "classifier.weight"}
    assert coverage["base_size_bytes"] == package["size_bytes"] > coverage["size_bytes"]
    text = _call("inspect", "head", "--package", "bert", folder=desk).stdout
    assert "2 of 13 points" in text
    assert "times smaller than the base" in text


@pytest.mark.slow
def test_an_export_tells_machines_how_far_it_is_from_pytorch(checkpoints: Make, tmp_path: Path) -> None:
    whole = _json("export", checkpoints("bert"), "p", folder=tmp_path)
    assert whole["verification"]["agrees"]
    cases = {entry["case"] for entry in whole["verification"]["outputs"]}
    assert cases == {"base", "replaced", "adapter", "rows"}
    assert _json("inspect", "p", folder=tmp_path) == whole | {"verification": None}


def test_run_blends_and_mixes_rows(desk: Path) -> None:
    from onnx_lora import AdapterSession

    session = AdapterSession(desk / "bert")
    session.load_adapter("a", desk / "head")
    session.load_adapter("b", desk / "plain")
    adapters = ["--adapter", "a=head", "--adapter", "b=plain:0.5"]
    _json("run", "bert", "--input", "feeds.npz", "--output", "blend.npz", *adapters, folder=desk)
    blend = np.load(desk / "blend.npz")["logits"]
    assert_close(blend, session.run(None, FEEDS, adapter={"a": 1.0, "b": 0.5})[0])
    rows = _json("run", "bert", "--input", "feeds.npz", "--output", "r.npz", *adapters, "--rows", "-,b", folder=desk)
    assert rows["outputs"] == [{"name": "logits", "shape": [2, 2], "dtype": "float32"}]
    assert_close(np.load(desk / "r.npz")["logits"], session.run(None, FEEDS, adapter=[None, {"b": 0.5}])[0])


def test_convert_then_run_the_converted_file(desk: Path) -> None:
    for name in ("c.safetensors", "c.onnx_adapter"):
        facts = _json("convert", "head", name, "--package", "bert", folder=desk)
        assert facts["written"] == name
        out = f"{name}.npz"
        _json("run", "bert", "--input", "feeds.npz", "--output", out, "--adapter", f"a={name}", folder=desk)
        _json("run", "bert", "--input", "feeds.npz", "--output", f"p{out}", "--adapter", "a=head", folder=desk)
        assert_close(np.load(desk / out)["logits"], np.load(desk / f"p{out}")["logits"])


def test_an_adapter_of_another_base_is_noted_and_strictly_refused(desk: Path, tmp_path: Path) -> None:
    shutil.copytree(desk / "plain", tmp_path / "plain")
    config = tmp_path / "plain" / "adapter_config.json"
    fields = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(fields | {"base_model_name_or_path": "org/another-bert"}), "utf-8")
    adapter, package = tmp_path / "plain", ["--package", "bert"]
    converted = tmp_path / "plain.safetensors"
    facts = [
        _json("inspect", adapter, *package, folder=desk),
        _json("convert", adapter, converted, *package, folder=desk),
        _json("inspect", converted, *package, folder=desk),
    ]
    assert all(any("'org/another-bert'" in note for note in each["coverage"]["notes"]) for each in facts)
    loaded = ["--adapter", f"it={adapter}"]
    calls: list[list[object]] = [
        ["inspect", adapter, *package],
        ["inspect", converted, *package],
        ["convert", adapter, tmp_path / "again.safetensors", *package],
        ["run", "bert", "--input", "feeds.npz", "--output", tmp_path / "o.npz", *loaded],
        ["fold", "bert", tmp_path / "folded", "--adapter", adapter],
    ]
    for call in calls:
        result = _call(*call, "--strict", folder=desk)
        assert result.returncode == 2, call
        assert "org/another-bert" in result.stderr


@pytest.mark.parametrize("name", ["blend.safetensors", "blend.onnx_adapter"])
def test_convert_writes_a_blend_as_one_file(desk: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    _json("convert", "--adapter", "head", "--adapter", "plain:0.5", file, "--package", "bert", folder=desk)
    for out, adapters in (("one.npz", [f"a={file}"]), ("two.npz", ["a=head", "b=plain:0.5"])):
        options = [option for adapter in adapters for option in ("--adapter", adapter)]
        _json("run", "bert", "--input", "feeds.npz", "--output", tmp_path / out, *options, folder=desk)
    assert_close(np.load(tmp_path / "one.npz")["logits"], np.load(tmp_path / "two.npz")["logits"])
    method = _json("inspect", file, folder=desk)["adapter"]["method"]
    assert method == ("blend of head:1, plain:0.5" if name.endswith("safetensors") else "")


def test_convert_writes_one_adapter_weaker(desk: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    _json("convert", file, "--package", "bert", "--adapter", "plain:0.5", folder=desk)
    for out, adapter in (("one.npz", f"a={file}"), ("two.npz", "a=plain:0.5")):
        _json("run", "bert", *IN_OUT[:2], "--output", tmp_path / out, "--adapter", adapter, folder=desk)
    assert_close(np.load(tmp_path / "one.npz")["logits"], np.load(tmp_path / "two.npz")["logits"])


def test_fold_writes_a_model_that_answers_as_the_adapter(desk: Path) -> None:
    import onnxruntime as ort

    _json("fold", "bert", "folded", "--adapter", "head", "--adapter", "plain:0.5", folder=desk)
    _json(
        *("run", "bert", "--input", "feeds.npz", "--output", "f.npz"),
        *("--adapter", "a=head", "--adapter", "b=plain:0.5"),
        folder=desk,
    )
    session = ort.InferenceSession(str(desk / "folded" / "model.onnx"))
    assert_close(session.run(None, FEEDS)[0], np.load(desk / "f.npz")["logits"])


def test_verify_against_peft(desk: Path, checkpoints: Make) -> None:
    facts = _json("verify", "bert", "--reference", checkpoints("bert"), "--adapter", "head", folder=desk)
    assert facts["agrees"]
    assert {(entry["graph"], entry["case"]) for entry in facts["outputs"]} == {("model", "base"), ("model", "adapter")}
    assert all(entry["difference"] <= entry["allowed"] for entry in facts["outputs"])


def test_verify_fails_on_another_base(desk: Path, tmp_path: Path) -> None:
    make_model("bert", seed=7).save_pretrained(tmp_path / "other")
    result = _call("verify", "bert", "--reference", tmp_path / "other", "--json", folder=desk)
    assert result.returncode == 4
    assert "must reproduce the model in PyTorch, and does not" in result.stderr
    body = json.loads(result.stdout)
    check_result("error", body)
    assert any(entry["difference"] > entry["allowed"] for entry in body["verification"]["outputs"])


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["inspect", "nowhere"], 2, "nowhere"),
        (["run", "bert", "--input", "none.npz", "--output", "o.npz"], 2, "there is no such file"),
        (["run", "bert", "--input", "none.npz", "--output", "new/folder/o.npz"], 2, "there is no such file"),
        (["run", "nowhere", "--input", "feeds.npz", "--output", "o.txt"], 2, "must end with .npz"),
        (["run", "nowhere", "--input", "feeds.npz", "--output", "feeds.npz"], 2, "exists already"),
        (["run", "nowhere", "--input", "feeds.npz", "--output", "feeds.npz/o.npz"], 3, "cannot be written"),
        (["run", "nowhere", "--input", "feeds.npz", "--output", "feeds.npz/new/o.npz"], 3, "cannot be written"),
        (["run", "nowhere", "--input", "feeds.npz", "--output", f"{'o' * 300}.npz"], 3, "cannot be written"),
        (["run", "bert", "--input", "notes.txt", "--output", "o.npz"], 2, "must be an .npz file"),
        (["run", "bert", "--input", "feeds.npz", "--output", "o.txt"], 2, "must end with .npz"),
        (["run", "bert", "--input", "feeds.npz", "--output", "feeds.npz"], 2, "exists already"),
        (["run", "bert", "--input", "feeds.npz", "--output", "o.npz", "--adapter", "x="], 2, "[NAME=]PATH[:WEIGHT]"),
        (["run", "bert", "--input", "feeds.npz", "--output", "o.npz", "--rows", "x,y"], 2, "no adapter 'x' is loaded"),
        (["run", "bert", *IN_OUT, "--adapter", "a=head", "--adapter", "a=plain"], 2, "two adapters are called 'a'"),
        (["run", "bert", *IN_OUT, "--adapter", "a=head:x"], 2, "'x' is not a weight, and 'head:x' is no path"),
        (["convert", "head", "c.safetensors", "--package", "head"], 2, "must be a package, and is a PEFT"),
        (["convert", "head", "c.bin", "--package", "bert"], 2, "must end with .safetensors, .onnx_adapter, .gguf"),
        (["convert", "head", "c.onnx_adapter"], 2, "give that package"),
        (["convert", "--adapter", "plain:0.5", "c"], 2, "must have --package"),
        (["convert", "nowhere", "c", "--initial", "plain"], 2, "there is nothing"),
        (["convert", "head", "c.safetensors", "--package", "bert", *ONNX], 2, "contradicts the name"),
        (["convert", "c.safetensors", "--package", "bert"], 2, "give one ADAPTER before OUT, or --adapter"),
        (["convert", "head", "plain", "c.safetensors", "--package", "bert"], 2, "give one ADAPTER before OUT"),
        (["convert", "head", "c.safetensors", "--package", "bert", "--adapter", "plain"], 2, "give one ADAPTER"),
        (["convert", "c.safetensors", "--package", "bert", "--adapter", "head:0.5"], 2, "classifier"),
        (["convert", "c.safetensors", "--package", "bert", "--adapter", "plain:nan"], 2, "must be a finite number"),
        (["fold", "bert", "head", "--adapter", "head"], 2, "exists already"),
        (["attach", "notes.txt", "out"], 2, "must be an ONNX model"),
        (["export", "nowhere-at-all", "out"], 2, "nowhere-at-all"),
        (["export", "bert", "out", "--targets", "a", "--targets-regex", "b"], 2, "exclude each other"),
        (["fold", "bert", "out", "--adapter", "head:0.5"], 2, "classifier"),
        (["fold", "bert", "out", "--adapter", "ad:x"], 2, "'x' is not a weight, and 'ad:x' is no path"),
        (["fold", "bert", "out", "--adapter", "head:"], 2, "'' is not a weight, and 'head:' is no path"),
    ],
)
def test_mistakes_get_a_message_and_an_exit_code(desk: Path, arguments: list[str], code: int, message: str) -> None:
    (desk / "notes.txt").write_text("no model, no archive")
    before = sorted(entry.name for entry in desk.iterdir())
    result = _call(*arguments, folder=desk)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(entry.name for entry in desk.iterdir()) == before


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=str
)
def test_damaged_feeds_are_refused_however_they_are_compressed(method: int, tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.random.default_rng(0).standard_normal(300))
    place = tmp_path / "feeds.npz"
    with zipfile.ZipFile(place, "w", method) as archive:
        archive.writestr("a.npy", array.getvalue())
    whole = place.read_bytes()
    refused = 0
    for position in range(30, len(whole), 7):
        place.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            read_feeds(place)
        except FeedError:
            refused += 1
    assert refused > 200


def test_errors_are_json_for_machines(desk: Path) -> None:
    result = _call("inspect", "nowhere", "--json", folder=desk)
    body = json.loads(result.stdout)
    check_result("error", body)
    assert (body["error"], body["exit_code"]) == ("AdapterFileError", 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "bert"], "Missing option '--input'"),
        (["inspect", "bert", "--nonsense"], "--nonsense"),
        (["export", "bert", "out", "--targets", "a", "--targets-regex", "b"], "exclude each other"),
    ],
)
def test_usage_errors_are_json_for_machines(desk: Path, arguments: list[str], message: str) -> None:
    result = _call(*arguments, "--json", folder=desk)
    body = json.loads(result.stdout)
    check_result("error", body)
    assert (result.returncode, body["error"], body["exit_code"]) == (2, "UsageError", 2)
    assert message in body["message"]
    assert message in result.stderr


def test_shapes_are_one_line_in_tables(desk: Path, tmp_path: Path) -> None:
    result = _call("run", "bert", "--input", "feeds.npz", "--output", tmp_path / "o.npz", folder=desk)
    assert result.stdout.splitlines()[0].rstrip() == "outputs  logits: 2 × 2"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files, like /proc")
@pytest.mark.parametrize("target", ["/proc/x.npz", "/proc/new/x.npz"])
def test_a_file_system_that_takes_no_files_is_named(desk: Path, target: str) -> None:
    result = _call("run", "bert", "--input", "feeds.npz", "--output", target, "--json", folder=desk)
    assert result.returncode == 3, result.stderr
    body = json.loads(result.stdout)
    assert (body["error"], body["path"]) == ("StorageError", target)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "failure, code, message",
    [
        (KeyboardInterrupt(), 130, "nothing half done is left"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "the disk is full"),
    ],
    ids=["interrupt", "full disk"],
)
def test_a_run_that_fails_as_it_writes_leaves_nothing_behind(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int, message: str
) -> None:
    def failing(file: Path, **values: object) -> None:
        file.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(np, "savez", failing)
    result = _call("run", "bert", "--input", "feeds.npz", "--output", tmp_path / "new" / "o.npz", "--json", folder=desk)
    assert result.returncode == code
    check_result("error", json.loads(result.stdout))
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_overwrite_what_appeared_meanwhile(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "o.npz"
    monkeypatch.setattr(np, "savez", lambda file, **values: target.write_text("another's"))
    result = _call("run", "bert", "--input", "feeds.npz", "--output", target, folder=desk)
    assert (result.returncode, target.read_text()) == (2, "another's")
    assert list(tmp_path.iterdir()) == [target]


def test_format_decides_where_the_name_does_not(desk: Path, tmp_path: Path) -> None:
    from onnx_lora import read_adapter

    _json("convert", "head", tmp_path / "c.bin", "--package", "bert", *ONNX, folder=desk)
    assert read_adapter(tmp_path / "c.bin").deltas


def test_an_interrupt_leaves_nothing_behind(desk: Path, tmp_path: Path, checkpoints: Make) -> None:
    command = [sys.executable, "-m", "onnx_lora", "export", str(checkpoints("swin")), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".onnx-lora-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # Interrupted within `exec`, CPython 3.11 ends by the signal itself, whatever exit code it is given; a shell says
    # 130 of both.
    assert process.returncode in (130, -signal.SIGINT), errors
    assert "interrupted; nothing half done is left" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_named(desk: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "out"
    result = _call("fold", "bert", target, "--adapter", "head", folder=desk)
    assert result.returncode == 3, result.stderr
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_how_the_help_of_each_begins(name: str) -> None:
    command = COMMANDS[name].load(name)
    assert command.name == name
    sentence = re.split(r"(?<=\.)\s", command.help or "", maxsplit=1)[0]
    assert " ".join(sentence.split()) == COMMANDS[name].says


def test_the_list_of_commands_has_them_all(desk: Path) -> None:
    listed = " ".join(_call("--help", folder=desk).stdout.split())
    for name, entry in COMMANDS.items():
        assert f"{name} {entry.says}" in listed


def test_python_m_is_the_command(desk: Path) -> None:
    command = [sys.executable, "-m", "onnx_lora", "inspect", "bert", "--json"]
    result = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(result.stdout)["points"] == 13


def test_a_package_opens_through_the_link(desk: Path) -> None:
    assert Package.open(desk / "bert").points


def test_run_refuses_one_array(desk: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))
    result = _call("run", "bert", "--input", tmp_path / "x.npy", "--output", tmp_path / "o.npz", folder=desk)
    assert result.returncode == 2
    assert "holds one array" in result.stderr


def test_verify_refuses_what_only_folds(desk: Path, checkpoints: Make) -> None:
    make_adapter(make_model("bert"), desk / "dora", r=2, target_modules=["query"], use_dora=True)
    result = _call("verify", "bert", "--reference", checkpoints("bert"), "--adapter", "dora", folder=desk)
    assert result.returncode == 2
    assert "export again with `--dora`" in result.stderr


def test_unproven_points_are_shown_refused_allowed_and_proven(desk: Path, checkpoints: Make, tmp_path: Path) -> None:
    doubted = shutil.copytree(desk / "bert", tmp_path / "doubted")
    manifest = json.loads((doubted / MANIFEST).read_text("utf-8"))
    for entry in (entry for graph in manifest["graphs"] for entry in (*graph["points"], *graph["replaceable"])):
        entry["unproven"] = "of a test"
    (doubted / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    (shown,) = _json("inspect", doubted, folder=desk)["unproven"]
    assert shown["reason"] == "of a test"
    assert len(shown["names"]) == 13 + 2
    inspected = _json("inspect", "head", "--package", doubted, folder=desk)
    assert "unproven, because of a test" in str(inspected["coverage"]["notes"])
    into: tuple[object, ...] = ("--input", "feeds.npz", "--output")
    commands: dict[str, tuple[object, ...]] = {
        "run": ("run", doubted, *into, tmp_path / "o.npz", "--adapter", "a=head"),
        "fold": ("fold", doubted, tmp_path / "folded", "--adapter", "head"),
        "convert": ("convert", "head", tmp_path / "c.safetensors", "--package", doubted),
    }
    for command in commands.values():
        refused = _call(*command, folder=desk)
        assert refused.returncode == 2
        assert "--allow-unproven" in refused.stderr
        _json(*command, "--allow-unproven", folder=desk)
    # A converted file is an adapter like any other.
    converted = ("run", doubted, *into, tmp_path / "p.npz", "--adapter", f"a={tmp_path / 'c.safetensors'}")
    assert _call(*converted, folder=desk).returncode == 2
    proven = _json("verify", doubted, "--reference", checkpoints("bert"), folder=desk)
    assert (len(proven["proven"]), proven["unproven"]) == (13 + 2, [])
    assert _json("inspect", doubted, folder=desk)["unproven"] == []
    _json(*converted, folder=desk)


# --- how adapters are spelled ------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sql", GivenAdapter(Path("sql"))),
        ("sql:0.5", GivenAdapter(Path("sql"), 0.5)),
        ("a=sql", GivenAdapter(Path("sql"), name="a")),
        ("a=sql:-2e-1", GivenAdapter(Path("sql"), -0.2, "a")),
        ("text-matching=there:1", GivenAdapter(Path("there"), 1.0, "text-matching")),
        ("./x=y", GivenAdapter(Path("./x=y"))),
        ("folder/x=y:2", GivenAdapter(Path("folder/x=y"), 2.0)),
        ("C:\\sql", GivenAdapter(Path("C:\\sql"))),
        ("a=C:\\sql:0.5", GivenAdapter(Path("C:\\sql"), 0.5, "a")),
        ("odd=name", GivenAdapter(Path("odd=name"))),  # is there
        ("odd:1", GivenAdapter(Path("odd:1"))),  # is there
        ("a=odd:1", GivenAdapter(Path("odd:1"), name="a")),
        ("a=odd:1:2", GivenAdapter(Path("odd:1"), 2.0, "a")),
        ("a=b=c", GivenAdapter(Path("b=c"), name="a")),
        ("D:/sql", GivenAdapter(Path("D:/sql"))),
    ],
)
def test_an_adapter_is_spelled_in_one_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: GivenAdapter
) -> None:
    for name in ("odd=name", "odd:1", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_adapter(text) == expected


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "is empty"),
        ("a=", "has no path"),
        ("there:x", "'x' is not a weight"),
        ("new:x", "'x' is not a weight"),
        ("C:\\a:x", "'x' is not a weight"),
        ("there:", "'' is not a weight"),
        ("there:nan", "a weight must be a finite number"),
        ("a=there:inf", "a weight must be a finite number"),
    ],
)
def test_a_wrong_spelling_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=problem):
        parse_adapter(text)


def test_adapters_are_called_as_their_folders_are_where_no_name_is_given(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.npz"
    adapters = ["--adapter", "head", "--adapter", "plain", "--rows", "head,plain"]
    _json("run", "bert", "--input", "feeds.npz", "--output", out, *adapters, folder=desk)
    twice = ["--adapter", "head", "--adapter", f"{desk}/head:0.5"]
    result = _call("run", "bert", "--input", "feeds.npz", "--output", tmp_path / "o.npz", *twice, folder=desk)
    assert result.returncode == 2
    assert "two adapters are called 'head'; give them names: NAME=PATH" in result.stderr


def test_one_of_several_adapters_is_chosen(desk: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    shutil.copytree(desk / "plain", several / "first")
    shutil.copytree(desk / "head", several / "second")
    refused = _call("inspect", several, folder=desk)
    assert refused.returncode == 2
    assert "`--adapter-name first`" in refused.stderr
    chosen = _json("inspect", several, "--adapter-name", "second", "--package", "bert", folder=desk)
    assert chosen["coverage"] == _json("inspect", "head", "--package", "bert", folder=desk)["coverage"]
    by_option, by_name = tmp_path / "o.npz", tmp_path / "n.npz"
    into = ("--input", "feeds.npz", "--output")
    _json("run", "bert", *into, by_option, "--adapter", f"a={several}", "--adapter-name", "first", folder=desk)
    _json("run", "bert", *into, by_name, "--adapter", f"first={several}", folder=desk)
    assert_close(np.load(by_option)["logits"], np.load(by_name)["logits"])
    both = ("--adapter", "head", "--adapter", several, "--adapter-name", "first")
    result = _call("fold", "bert", tmp_path / "f", *both, folder=desk)
    assert "--adapter-name chooses within one adapter's file" in result.stderr


# --- the words of whoever asked ----------------------------------------------------------------


def test_messages_name_options_on_the_command_line_and_arguments_in_python(desk: Path, tmp_path: Path) -> None:
    result = _call("convert", "head", tmp_path / "c.safetensors", folder=desk)
    assert "give that package (`--package`)" in result.stderr
    with pytest.raises(InputError, match=r"give that package \(`package=\.\.\.`\)"):
        write_adapter(read_adapter(desk / "head"), tmp_path / "c.safetensors", format="safetensors")


@pytest.mark.parametrize(
    "said, shown",
    [
        ("or `allow_unproven=True`", "or `--allow-unproven`"),
        ("`verify=False`", "`--no-verify`"),
        ('`targets=["all-linear", "q"]`', "`--targets all-linear,q`"),
        ("`targets=` including q", "`--targets` including q"),
        ('`name="x y"`', "`--adapter-name x y`"),
        ("`requantize=Requantize()`", "`--requantize`"),
        ("`quantize` and `a`", "`quantize` and `a`"),
        ("`save_projection=False`", "`save_projection=False`"),  # PEFT's
    ],
)
def test_an_argument_becomes_its_option(said: str, shown: str) -> None:
    assert in_options(said) == shown


def test_no_message_names_what_does_not_exist() -> None:
    """Below the command line a message names arguments of public functions, each of which is an option too."""
    options: set[str] = set()
    for name in COMMANDS:
        for parameter in COMMANDS[name].load(name).params:
            options.update([*parameter.opts, *parameter.secondary_opts])
    assert {f"--{option}" for option in OPTIONS.values()} <= options
    of_others = {"--help", "--quantize_int4", "--extra_options"}  # click's, Olive's, the GenAI builder's
    arguments = _public_arguments()
    root = Path(onnx_lora.__file__).parent
    for file in root.rglob("*.py"):
        is_of_commands = file.parent.name == "commands" or file.name in ("cli.py", "report.py", "results.py")
        if file.name == "words.py":
            continue
        for text in _said_in(file):
            for argument in re.findall(r"`([a-z_]+)=[^`]*`", text):
                assert argument not in arguments or argument in OPTIONS, f"{file.name}: {argument} is no option"
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))
            assert named <= options | of_others, f"{file.name}: {named - options}"
            assert is_of_commands or named <= of_others, f"{file.name}: {text!r} speaks of options"


def _public_arguments() -> set[str]:
    """The arguments of all public functions."""
    found: set[str] = set()
    for name in onnx_lora.__all__:
        value = getattr(onnx_lora, name)
        if inspect.isfunction(value):
            found.update(inspect.signature(value).parameters)
    return found


def _said_in(file: Path) -> list[str]:
    """The texts of a file that may be messages: all but those that stand alone, which are docstrings."""
    tree = ast.parse(file.read_text("utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    said: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            said.append(node.value)
    return said


# --- outputs that are there already ------------------------------------------------------------


def test_force_replaces_what_the_command_wrote_and_nothing_else(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    _json("convert", "head", out, "--package", "bert", folder=desk)
    before = out.read_bytes()
    assert "exists already" in _call("convert", "plain", out, "--package", "bert", folder=desk).stderr
    broken = _call("convert", "nowhere", out, "--package", "bert", "--force", folder=desk)
    assert (broken.returncode, out.read_bytes()) == (2, before)
    result = _json("convert", "plain", out, "--package", "bert", "--force", folder=desk)
    assert result["written"] == str(out)
    assert out.read_bytes() != before
    folded = tmp_path / "folded"
    for adapter in ("head", "plain"):
        written = _json("fold", "bert", folded, "--adapter", adapter, "--force", folder=desk)
        assert written["written"] == str(folded)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for command in (["fold", "bert", home, "--adapter", "head"], ["attach", "bert/base.onnx", home]):
        refused = _call(*command, "--force", folder=desk)
        assert refused.returncode == 2
        assert "--force replaces" in refused.stderr
    assert [entry.name for entry in home.iterdir()] == ["thesis.txt"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.safetensors", "folded", "home"]


def test_a_message_about_a_forced_output_names_it_as_the_user_does(desk: Path, tmp_path: Path) -> None:
    package = shutil.copytree(desk / "bert", tmp_path / "package")
    result = _call("attach", "feeds.npz", package, "--force", folder=desk)
    assert result.returncode == 2
    assert ".onnx-lora-" not in result.stderr
    assert Package.open(package).points


def test_names_may_come_with_commas(desk: Path, tmp_path: Path) -> None:
    package = _json("attach", "bert/base.onnx", tmp_path / "p", "--targets", "query, value", folder=desk)
    assert set(package["points_by_name"]) == {"query", "value"}


# --- progress ----------------------------------------------------------------------------------


def test_a_log_gets_a_line_for_each_thing_that_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    with report.progress("exporting") as update:
        for seconds, what in (
            (0.5, "export"),
            (1.0, "load"),
            (3, "verify"),
            (4, "verify"),
            (40, "verify"),
            (41, "write"),
        ):
            now[0] = seconds
            update(what, 1, 2)
    assert capsys.readouterr().err.splitlines() == [
        "exporting: verify 1/2, 3 s",
        "exporting: verify 1/2, 40 s",
        "exporting: write 1/2, 41 s",
    ]
