"""Heads with a batch norm in them, saved whole: its weights and its statistics are PEFT's, its count of batches changes
nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from onnx_lora import AdapterSession, Package, bind, export, fold, fold_to, read_adapter
from onnx_lora.errors import BindError
from tests.support.exporters import HAS_OPTIMUM
from tests.support.numbers import assert_close

PICTURES = torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
NORM = "decode_head.batch_norm"


def _segformer() -> Any:
    """With statistics as a training leaves them."""
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[1, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=5,
    )
    torch.manual_seed(0)
    model = hf.SegformerForSemanticSegmentation(config).eval()
    norm = model.decode_head.batch_norm
    torch.nn.init.normal_(norm.running_mean)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def _train(folder: Path) -> Path:
    """An adapter whose copy of the head differs from the base's in everything, its statistics too."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules=["query" if HAS_OPTIMUM else "q_proj"],
        modules_to_save=["decode_head"],
        init_lora_weights=False,
    )
    model = get_peft_model(_segformer(), config).eval()
    copy = model.base_model.model.decode_head.modules_to_save["default"]
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        copy.batch_norm.running_mean.add_(1)
        copy.batch_norm.running_var.mul_(3)
        copy.batch_norm.num_batches_tracked.add_(7)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("segformer")
    _segformer().save_pretrained(folder / "checkpoint")
    return export(folder / "checkpoint", folder / "package", replaceable=["decode_head"], verify=False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("adapter"))


def _answer(model: Any) -> Any:
    with torch.no_grad():
        return model(PICTURES).logits.numpy()


def _run(session: Any, **choice: Any) -> Any:
    return session.run(["logits"], {"pixel_values": PICTURES.numpy()}, **choice)[0]


def test_a_head_with_a_batch_norm_has_pefts_numbers(package: Package, adapter: Path, tmp_path: Path) -> None:
    expected = _answer(PeftModel.from_pretrained(_segformer(), adapter).eval())
    base = _answer(_segformer())
    assert np.abs(expected - base).max() > 0.01
    session = AdapterSession(package)
    session.load_adapter("it", adapter)
    assert_close(_run(session, adapter="it"), expected)
    assert_close(_run(session), base)
    assert_close(_run(fold(package, adapter)), expected)
    fold_to(package, bind(read_adapter(adapter), package), tmp_path / "folded")
    (file,) = (tmp_path / "folded").glob("*.onnx")
    assert_close(_run(_open(file)), expected)


def _open(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(file)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_the_count_of_batches_is_noted(adapter: Path, package: Package, tmp_path: Path, dtype: torch.dtype) -> None:
    """Some programs write all tensors of a file in one type."""
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    (key,) = [key for key in tensors if key.endswith("num_batches_tracked")]
    save_file(tensors | {key: tensors[key].to(dtype)}, weights)
    bound = bind(read_adapter(tmp_path), package)
    assert any("num_batches_tracked: counts the batches of a training" in note for note in bound.coverage.notes)
    assert f"{NORM}.running_var" in bound.coverage.replaced


def test_statistics_that_a_package_was_not_asked_for_are_named(adapter: Path, tmp_path: Path) -> None:
    _segformer().save_pretrained(tmp_path / "checkpoint")
    plain = export(tmp_path / "checkpoint", tmp_path / "package", verify=False)
    with pytest.raises(BindError) as caught:
        bind(read_adapter(adapter), plain)
    (problem,) = [problem for problem in caught.value.problems if problem.startswith(f"{NORM}.running_mean")]
    assert "`replaceable=`" in problem
