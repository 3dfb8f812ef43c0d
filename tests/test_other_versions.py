"""A checkpoint and an adapter saved under either version of transformers, used under the other: exact, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from onnx_lora import AdapterSession, Package, fold
from onnx_lora.adapters.other_versions import read_table
from onnx_lora.exporter import export
from scripts.other_versions import classes, make_model
from tests.golden.versions import MAJOR, MODELS, VERSIONS, folder_of
from tests.support.exporters import VIA
from tests.support.numbers import assert_close
from tests.support.once import made_once

# Where modules are called otherwise in the two versions.
RENAMED = frozenset(MODELS) - {"bert", "llama", "qwen3_moe"}

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# Optimum's trace of this one follows the experts that its own tokens go to.
NAMES = [name for name in MODELS if not (name == "qwen3_moe" and VIA == "optimum")]


@pytest.fixture(scope="session")
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Of a model and of the version that saved its checkpoint."""
    name, version = request.param

    def make(folder: Path) -> None:
        task = "text-generation" if name in ("llama", "gpt_neox", "qwen3_moe") else None
        export(folder_of(name, version), folder, targets="all", replaceable="heads", via=VIA, task=task)

    return Package.open(made_once(tmp_path_factory, f"{name}-of-{version}", make))


def _answer(session: Any, case: Any, **choice: Any) -> Any:
    needed = [item.name for item in session.get_inputs()]
    rows, length = case["input_ids"].shape if "input_ids" in case else (0, 0)
    made = {
        "position_ids": np.broadcast_to(np.arange(length), (rows, length)),
        "token_type_ids": np.zeros((rows, length), np.int64),
    }
    feeds = {name: value for name, value in {**made, **case}.items() if name in needed}
    return session.run(["logits"], feeds, **choice)[0]


@pytest.mark.parametrize("of_adapter", VERSIONS)
@pytest.mark.parametrize(
    "package", [(name, version) for name in NAMES for version in VERSIONS], indirect=True, ids=lambda made: str(made)
)
def test_an_adapter_of_either_version_is_exact_on_a_checkpoint_of_either(
    package: Package, of_adapter: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name, _ = request.node.callspec.params["package"]
    saved = folder_of(name, of_adapter)
    case = load_file(saved / "answer.safetensors")
    session = AdapterSession(package)
    adapter = session.load_adapter("one", saved / "adapter")
    assert_close(_answer(session, case), case["base"])
    assert_close(_answer(session, case, adapter="one"), case["logits"])
    is_told = any("another version of transformers" in note for note in adapter.coverage.notes)
    assert is_told == (name in RENAMED and of_adapter != MAJOR)
    assert_close(_answer(fold(package, saved / "adapter"), case), case["logits"])


@pytest.mark.parametrize("kind", sorted(read_table()))
def test_the_table_has_the_names_of_the_installed_version(kind: str) -> None:
    found = [make_model(kind, name) for of_kind, name in classes() if of_kind == kind]
    modules = {_NUMBER.sub("#", name) for model in found if model is not None for name, _ in model.named_modules()}
    if not modules:
        pytest.skip(f"transformers {MAJOR} makes no {kind} of its defaults")
    for newer, older in read_table()[kind].items():
        own = older if VERSIONS[0] == MAJOR else newer
        assert any(f".{module}".endswith(f".{own}") for module in modules), own
