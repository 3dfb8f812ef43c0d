"""From an adapter's files to outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onnx_lora.adapters import bind, read_adapter, write_bound
from onnx_lora.runtime import AdapterSession, fold, fold_to
from tests.runtime import tiny
from tests.runtime.conftest import CPU
from tests.support.numbers import assert_close, assert_same_bits

DATA = tiny.batch()
RANK, ALPHA = 2, 6


@pytest.fixture(scope="module")
def peft(tmp_path_factory) -> Path:
    """A PEFT folder over the three modules, with a scale of 3."""
    folder = tmp_path_factory.mktemp("adapters") / "sql"
    folder.mkdir()
    rng = np.random.default_rng(4)
    tensors = {}
    for module, (width, out) in tiny.MODULES.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=(RANK, width)).astype("f")
        tensors[f"{prefix}.lora_B.weight"] = rng.normal(size=(out, RANK)).astype("f")
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q", "k", "up"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def expected(peft):
    raw = load_file(peft / "adapter_model.safetensors")
    tensors = {}
    for module in tiny.MODULES:
        tensors[f"{module}.lora_A.weight"] = raw[f"base_model.model.{module}.lora_A.weight"].T[None]
        tensors[f"{module}.lora_B.weight"] = raw[f"base_model.model.{module}.lora_B.weight"].T[None] * (ALPHA / RANK)
    return tiny.bound("sql", tensors)


def test_a_peft_folder_runs_with_its_scale(package, peft, expected):
    session = AdapterSession(package, providers=CPU)
    bound = session.load_adapter("sql", str(peft))
    assert bound.coverage.applied == tuple(tiny.MODULES)
    assert_close(session.run(["logits"], DATA.feeds, adapter="sql")[0], tiny.oracle(DATA, (expected, 1.0)))


def test_read_bound_and_converted_are_the_same_adapter(package, peft, tmp_path):
    adapter = read_adapter(peft)
    bound = bind(adapter, package)
    converted = tmp_path / "sql.safetensors"
    write_bound(bound, converted)
    session = AdapterSession(package, providers=CPU)
    answers = []
    for index, form in enumerate((peft, adapter, bound, converted)):
        session.load_adapter(str(index), form)
        answers.append(session.run(["logits"], DATA.feeds, adapter=str(index))[0])
    for answer in answers[1:]:
        assert_same_bits(answer, answers[0])


def test_paths_are_folded_and_blended_by_weight(package, peft, expected, tmp_path):
    wanted = tiny.oracle(DATA, (expected, 0.5))
    assert_close(fold(package, {peft: 0.5}, providers=CPU).run(["logits"], DATA.feeds)[0], wanted)
    out = fold_to(package, {str(peft): 0.5}, tmp_path / "out")
    assert (out / "model.onnx").exists()


def test_a_package_may_be_a_relative_path(package, peft, expected, monkeypatch):
    monkeypatch.chdir(package.path.parent)
    own = tiny.adapter("own", 5, labels=7)
    assert_close(
        fold(package.path.name, own, providers=CPU).run(["logits"], DATA.feeds)[0], tiny.oracle(DATA, (own, 1))
    )
    session = AdapterSession(package.path.name, providers=CPU)
    assert session.run(["logits"], DATA.feeds)[0].shape == (2, 3)
