"""Every architecture we promise: delta equals fold equals PEFT in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from onnx_lora import AdapterSession, Package, fold
from onnx_lora.exporter import export
from onnx_lora.exporter.frontends.source import Reference
from onnx_lora.exporter.verification.random_adapters import put_adapter
from tests.support.exporters import HAS_OPTIMUM, VIA, load_model, references
from tests.support.models import ARCHITECTURES, make_adapter
from tests.support.newer_models import MATRIX_ONLY
from tests.support.numbers import assert_close, assert_same_bits

Make = Callable[[str], Path]
Outputs = Mapping[str, np.ndarray[Any, Any]]

NAMES = [pytest.param(name, marks=[pytest.mark.matrix] if name in MATRIX_ONLY else []) for name in ARCHITECTURES]

# Graphs in which a row cannot have an adapter of its own, and why.
WITHOUT_ROWS = {
    "clip": "texts and images are two batches",
    "siglip": "texts and images are two batches",
    "deberta_v2": "query and key also read the relative positions, which have no batch",
    "swin": "windows are folded into the batch",
}


_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# What is targeted where "all-linear" cannot be: PEFT saves every module that ends with "classifier", and fails when it
# has adapted one of them before; it looks for embeddings that speech models lack; it adapts experts, which have no
# points, and the products within torch's own attention.
ALL_LINEAR: dict[str, Any] = {
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "wav2vec2": ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"],
    "siglip": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],
    "mamba2": ["in_proj"],  # PEFT refuses the other
    "qwen3_moe": _ATTENTION,
    "mixtral": _ATTENTION,
    "olmoe": _ATTENTION,
}


def _configs(name: str) -> dict[str, dict[str, Any]]:
    """LoRA on everything with ranks and alphas that differ by module, and on q/v alone."""
    suffixes = ARCHITECTURES[name][1]
    every = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ALL_LINEAR.get(name, "all-linear"),
        "rank_pattern": {suffixes[0]: 5, suffixes[-1]: 2},
        "alpha_pattern": {suffixes[-1]: 1},
    }
    few = {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": suffixes}
    return {"all-linear": every, "q/v": few}


def _run(session: Any, case: Reference, **choice: Any) -> Outputs:
    names = [value.name for value in session.get_outputs()]
    inputs = [value.name for value in session.get_inputs()]
    feeds = {name: value for name, value in case.feeds(inputs).items() if name in inputs}
    return dict(zip(names, session.run(None, feeds, **choice), strict=True))


def _assert_equal(actual: Outputs, expected: Outputs) -> None:
    for name, value in actual.items():
        assert_close(value, expected[name])


@pytest.mark.parametrize("config", ["all-linear", "q/v"])
@pytest.mark.parametrize("name", NAMES)
def test_delta_equals_fold_equals_peft(
    name: str, config: str, checkpoints: Make, packages: Make, tmp_path: Path
) -> None:
    package = Package.open(packages(name))
    adapter = make_adapter(load_model(checkpoints(name), task=None)[0], tmp_path / "adapter", **_configs(name)[config])
    model, task = load_model(checkpoints(name), task=None)
    cases = references(model, task)
    bases = [case.answer() for case in cases]
    PeftModel.from_pretrained(model, adapter)

    moved = 0.0
    for case, base in zip(cases, bases, strict=True):
        session = AdapterSession(package, graph=case.graph)
        session.load_adapter("it", adapter)
        expected = case.answer()
        _assert_equal(_run(session, case), base)
        delta = _run(session, case, adapter="it")
        _assert_equal(delta, expected)
        _assert_equal(_run(fold(package, adapter, graph=case.graph), case), expected)
        moved = max(moved, *(float(np.abs(value - base[key]).max(initial=0.0)) for key, value in delta.items()))
    assert moved > 1e-2, "the adapter must be seen in the outputs, or nothing was compared"


@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_equals_the_single_runs(name: str, checkpoints: Make, packages: Make, tmp_path: Path) -> None:
    if name in WITHOUT_ROWS:
        pytest.skip(f"{name} has no rows: {WITHOUT_ROWS[name]}")
    package = Package.open(packages(name))
    model, task = load_model(checkpoints(name), task=None)
    cases = references(model, task)
    adapter = make_adapter(model, tmp_path / "adapter", **_configs(name)["all-linear"])
    for case in cases:
        session = AdapterSession(package, graph=case.graph)
        session.load_adapter("it", adapter)
        base, alone = _run(session, case), _run(session, case, adapter="it")
        mixed = _run(session, case, adapter=[None, "it"])
        for key, value in mixed.items():
            if value.shape and value.shape[0] == 2:
                assert_close(value[:1], base[key][:1])
                assert_close(value[1:], alone[key][1:])


@pytest.mark.parametrize("name", ["clip", "deberta_v2", "swin"])
def test_rows_are_refused_where_the_batch_is_not_the_first_axis(
    name: str, checkpoints: Make, packages: Make, tmp_path: Path
) -> None:
    from onnx_lora.errors import SelectionError

    package = Package.open(packages(name))
    model, task = load_model(checkpoints(name), task=None)
    (case,) = references(model, task)
    adapter = make_adapter(model, tmp_path / "adapter", **_configs(name)["all-linear"])
    session = AdapterSession(package)
    session.load_adapter("it", adapter)
    with pytest.raises(SelectionError, match="separate calls"):
        _run(session, case, adapter=[None, "it"])


@pytest.mark.parametrize("name", NAMES)
def test_rank_zero_equals_the_base_graph(name: str, checkpoints: Make, packages: Make) -> None:
    """Bit for bit, at ONNX Runtime's default optimisation. A head that is an input takes another kernel than one
    that is a constant, and may differ in the last bit."""
    import onnxruntime as ort

    package = Package.open(packages(name))
    model, task = load_model(checkpoints(name), task=None)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for case in references(model, task):
        graph = package.graph(case.graph)
        base = _run(ort.InferenceSession(str(package.path / graph.base_file), options), case)
        zero = _run(ort.InferenceSession(str(package.path / graph.file), options), case)
        for key, value in zero.items():
            if graph.replaceable:
                assert_close(value, base[key])
            else:
                assert_same_bits(value, base[key])


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_a_fresh_adapter_equals_the_base(name: str, checkpoints: Make, packages: Make, tmp_path: Path) -> None:
    package = Package.open(packages(name))
    model, task = load_model(checkpoints(name), task=None)
    cases = references(model, task)
    adapter = make_adapter(
        model,
        tmp_path / "fresh",
        r=4,
        target_modules=ARCHITECTURES[name][1],
        init_lora_weights=True,
        modules_to_save=None,
    )
    for case in cases:
        session = AdapterSession(package, graph=case.graph)
        bound = session.load_adapter("fresh", adapter)
        assert set(bound.coverage.silent) == set(bound.coverage.applied)
        base = _run(session, case)
        for key, value in _run(session, case, adapter="fresh").items():
            assert_same_bits(value, base[key])


@pytest.mark.skipif(HAS_OPTIMUM, reason="transformers 5's exporter knows it")
def test_verification_tries_what_peft_refuses_for_mamba(checkpoints: Make, tmp_path: Path) -> None:
    package = export(checkpoints("mamba2"), tmp_path / "package", via=VIA)  # which verifies
    model = load_model(checkpoints("mamba2"), task=None)[0]
    with put_adapter(package, model) as tensors:
        assert "backbone.layers.0.mixer.out_proj.lora_B.weight" in tensors
        assert all(np.any(tensors[point.lora_b]) for point in package.points.values())
