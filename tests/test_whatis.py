"""What a path is, and mistakes that are told before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onnx_lora.errors import ModelError
from onnx_lora.exporter.frontends.configs.hub import find_revision
from onnx_lora.exporter.frontends.early import check_targets
from onnx_lora.exporter.frontends.exporters.optimum_tasks import explain_task
from onnx_lora.whatis import Thing, explain, what_is
from scripts import optimum_tasks

# Runs commands in one process to which the slow libraries do not exist.
_WITHOUT_LIBRARIES = """
import contextlib, io, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "optimum", "peft", "diffusers"):
            raise AssertionError(f"{name} is loaded to find a mistake that can be seen at once")

sys.meta_path.insert(0, Blocked())
from onnx_lora.cli import main
for line in sys.stdin:
    sys.argv = ["onnx-lora", *json.loads(line)]
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
    print(json.dumps([code, said.getvalue()]))
"""

# Commands, and what they must say. `desk` has a checkpoint, a package, an adapter and a folded model.
MISTAKES: list[tuple[list[str], str]] = [
    (["export", "./nowhere", "out"], "there is no such folder, and the name is none of the hub's"),
    (["export", "nobody/nothing", "out"], "no model of this name could be had from the hub"),
    (["export", "adapter", "out"], "must be a checkpoint, and is a PEFT adapter of org/base; give its base"),
    (["export", "package", "out"], "must be a checkpoint, and is a package of onnx-lora; give the checkpoint"),
    (["export", "folded", "out"], "must be a checkpoint, and is a folder of ONNX files; `attach` gives"),
    (["export", "checkpoint/config.json", "out"], "must be a checkpoint's folder"),
    (["export", "checkpoint", "out", "--task", "text-classifikation"], "Optimum exports bert for feature-extraction"),
    (["export", "checkpoint", "out", "--targets", "qeury"], "'qeury' names no module; close: query"),
    (["export", "checkpoint", "package"], "exists already"),
    (["export", "checkpoint", "out", "--precision", "int4"], "does not know the architecture BertForSequenceClass"),
    (["attach", "checkpoint", "out"], "must be an ONNX file, or a folder of them, and is a checkpoint of Bert"),
    (["attach", "package", "out"], "and is a package of onnx-lora; it has its points already"),
    (["attach", "nowhere.onnx", "out"], "there is no such file"),
    (["inspect", "checkpoint"], "must be an adapter, and is a checkpoint of BertForSequenceClassification"),
    (["convert", "folded", "out"], "must be an adapter, and is a folder of ONNX files"),
    (["fold", "checkpoint", "out", "--adapter", "adapter"], "must be a package, and is a checkpoint of Bert"),
    (["fold", "adapter", "out", "--adapter", "package"], "must be a package, and is a PEFT adapter of org/base"),
    (["fold", "package", "out", "--adapter", "checkpoint"], "must be an adapter, and is a checkpoint of Bert"),
    (["verify", "package", "--reference", "adapter"], "must be a checkpoint, and is a PEFT adapter of org/base"),
    (["generate", "folded", "--prompt", "x"], "what `fold` wrote is a plain model"),
    (["quantize", "checkpoint", "out"], "make a package of it first: `export`"),
    (["convert", "package", "out"], "must be an adapter, and is a package of onnx-lora"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, packages: Callable[[str], Path]) -> Path:
    from onnx_lora import fold_to
    from tests.support.models import make_adapter, make_model

    folder = tmp_path_factory.mktemp("mistakes")
    make_model("bert").save_pretrained(folder / "checkpoint")
    (folder / "package").symlink_to(packages("bert"))
    make_adapter(make_model("bert"), folder / "adapter", r=2, target_modules=["query"])
    fold_to(folder / "package", folder / "adapter", folder / "folded")
    config = folder / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(fields | {"base_model_name_or_path": "org/base"}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def answers(desk: Path) -> list[Any]:
    lines = "\n".join(json.dumps(arguments) for arguments, _ in MISTAKES)
    command = [sys.executable, "-c", _WITHOUT_LIBRARIES]
    result = subprocess.run(command, input=lines, cwd=desk, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_told_before_a_library_is_loaded(answers: list[Any], number: int) -> None:
    if "int4" in MISTAKES[number][0]:
        pytest.importorskip("onnxruntime_genai", reason="needs the GenAI builder: pip install onnx-lora[genai]")
    code, said = answers[number]
    assert code == 2, said
    assert MISTAKES[number][1] in said


def test_what_a_folder_is(desk: Path, tmp_path: Path) -> None:
    things = {name: what_is(desk / name) for name in ("checkpoint", "package", "adapter", "folded", "nowhere")}
    assert things == {
        "checkpoint": Thing.CHECKPOINT,
        "package": Thing.PACKAGE,
        "adapter": Thing.ADAPTER,
        "folded": Thing.ONNX,
        "nowhere": Thing.NOTHING,
    }
    (tmp_path / "tokenizer.json").write_text("{}")
    assert what_is(tmp_path) is Thing.TOKENIZER
    assert what_is(tmp_path / "tokenizer.json") is Thing.FILE
    assert what_is(Path("a\0b")) is Thing.NOTHING


def test_a_checkpoint_with_graphs_or_an_adapter_beside_it_is_one_still(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "model.onnx", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    assert explain(tmp_path, Thing.CHECKPOINT) is None
    assert explain(tmp_path, Thing.ONNX) is None
    assert explain(tmp_path, Thing.ADAPTER) is None
    assert "is a PEFT adapter" in str(explain(tmp_path, Thing.PACKAGE))
    (tmp_path / "onnx_lora.json").write_text("{}")
    assert "is a package" in str(explain(tmp_path, Thing.CHECKPOINT))


@pytest.mark.parametrize("content", ["", "[]", '{"architectures": 3}', '{"architectures": [[1]]}', "\xff"])
def test_a_damaged_config_names_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, "latin-1")
    (tmp_path / "model.safetensors").write_text("")
    assert str(explain(tmp_path, Thing.ADAPTER)).startswith("is a checkpoint; give an adapter")


# --- tasks, targets, revisions -----------------------------------------------------------------


def test_the_table_of_tasks_is_optimums() -> None:
    pytest.importorskip("optimum.exporters.onnx")
    assert json.loads(optimum_tasks.TABLE.read_text("utf-8")) == optimum_tasks.make_table(), "run make docs"


@pytest.mark.parametrize(
    "task, fields, problem",
    [
        (None, {"model_type": "bert"}, None),
        ("text-classification", {"model_type": "bert"}, None),
        ("sequence-classification", {"model_type": "bert"}, None),
        ("image-classification", {"model_type": "bert"}, "Optimum exports bert for feature-extraction"),
        ("text-generation", {"model_type": "of_tomorrow"}, None),
        ("text-generation", {"model_type": "gemma3", "text_config": {}}, None),
        ("nonsense", {"model_type": "of_tomorrow"}, "there is no task 'nonsense'"),
        ("nonsense", {}, "there is no task 'nonsense'"),
    ],
)
def test_a_task_is_refused_where_the_table_is_sure(
    task: str | None, fields: dict[str, Any], problem: str | None
) -> None:
    said = explain_task(task, fields)
    assert (said is None) if problem is None else (said or "").startswith(problem)


def test_targets_are_refused_only_where_they_are_misspelt(desk: Path) -> None:
    for fine in ("all-linear", ["query", "all"], ["lm_head"], ["something_else"], r".*\.qeury"):
        check_targets(desk / "checkpoint", fine)
    check_targets(desk / "nowhere", ["qeury"])
    with pytest.raises(ModelError, match=r"'attention\.self\.qeury' names no module; close: query"):
        check_targets(desk / "checkpoint", ["value", "attention.self.qeury"])


def test_a_revision_of_the_hub_is_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from huggingface_hub import file_download

    own = tmp_path / "models--org--base"
    snapshot = own / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (own / "refs").mkdir()
    (own / "refs" / "v1").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert Path(find_revision("org/base@v1")) == snapshot
    with pytest.raises(ModelError, match="no model org/base with a revision 'v2'"):
        find_revision("org/base@v2")
    here = tmp_path / "org" / "base@v1"
    here.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_revision("org/base@v1") == "org/base@v1"  # a folder of that name is that folder
    for other in ("plain", "./x@y", "a b@c"):
        assert find_revision(other) == other
