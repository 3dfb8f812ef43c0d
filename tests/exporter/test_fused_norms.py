"""Convolutions with a batch norm behind them: what we export keeps the two apart, so that PEFT's change goes in
between; in graphs that came with both in one weight, the module is refused by that name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from onnx_lora import AdapterSession, attach, fold
from onnx_lora.errors import BindError
from onnx_lora.exporter import export
from tests.support.numbers import assert_close

PICTURES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def _fill(model: nn.Module) -> Any:
    """Norms that training has moved."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_(1, 0.3)
                module.bias.normal_()
    return model.eval()


def _resnet() -> Any:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return _fill(hf.ResNetForImageClassification(config))


def _mobilenet() -> Any:
    return _fill(
        hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, tf_padding=False)
        )
    )


def _regnet() -> Any:
    config = hf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    return _fill(hf.RegNetForImageClassification(config))


class Timm(nn.Module):
    """Of no library of Hugging Face's: exported by torch.onnx (dynamo)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.normalization(self.convolution(pixel_values)))
        answer: torch.Tensor = self.classifier(features.mean((2, 3)))
        return answer


def _tune(model: nn.Module, folder: Path, norms: list[str]) -> Path:
    """An adapter of every convolution without groups, with norms of its own, statistics among them."""
    torch.manual_seed(1)
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    config = LoraConfig(r=4, target_modules=plain, modules_to_save=norms, init_lora_weights=False)
    tuned = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, tensor in [*tuned.named_parameters(), *tuned.named_buffers()]:
            if "modules_to_save" in name and tensor.is_floating_point():
                tensor.copy_(tensor.abs() + torch.rand_like(tensor) / 2)
    tuned.save_pretrained(folder)
    return folder


def _logits(model: Any) -> Any:
    with torch.no_grad():
        answer = model(pixel_values=PICTURES)
    return getattr(answer, "logits", answer).numpy()


@pytest.mark.parametrize("make", [_resnet, _mobilenet, _regnet, lambda: _fill(Timm())])
def test_convolutions_and_norms_are_adapted_as_peft_does(make: Any, tmp_path: Path) -> None:
    model = make()
    wanted: dict[str, Any] = {"targets": "all", "replaceable": ["normalization", "classifier"]}
    if isinstance(model, Timm):
        package = export(model, tmp_path / "package", example_inputs={"pixel_values": PICTURES}, **wanted)
    else:
        model.save_pretrained(tmp_path / "checkpoint")
        package = export(tmp_path / "checkpoint", tmp_path / "package", **wanted)
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert convolutions <= set(package.points)
    assert any(name.endswith("running_var") for name in package.replaceable)

    adapter = _tune(model, tmp_path / "adapter", ["normalization", "classifier"])
    base = _logits(model)
    expected = _logits(PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval())
    session = AdapterSession(package)
    session.load_adapter("it", adapter)
    feeds = {"pixel_values": PICTURES.numpy()}
    assert_close(session.run(None, feeds)[0], base)
    assert_close(session.run(None, feeds, adapter="it")[0], expected)
    assert_close(fold(package, adapter).run(None, feeds)[0], expected)
    assert abs(expected - base).max() > 0.01


@pytest.mark.parametrize("given", ["names", "checkpoint"])
def test_a_graph_that_came_with_them_fused_says_so(given: str, tmp_path: Path) -> None:
    """Norms as they are made scale all outputs alike: nobody scales a convolution's inputs."""
    model = hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (PICTURES,), file, dynamo=False, input_names=["pixel_values"])
    checkpoint = tmp_path / "checkpoint" if given == "checkpoint" else None
    package = attach(file, tmp_path / "package", targets="all", checkpoint=checkpoint)
    reasons = {node.reason for node in package.graph().unplaced}
    assert all(reason.startswith("fused batch norm") for reason in reasons)
    config = LoraConfig(r=2, target_modules=["embedder.convolution"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BindError, match="fused batch norm"):
        AdapterSession(package).load_adapter("it", tmp_path / "adapter")


def test_a_convolution_that_peft_cannot_copy_gets_no_point(tmp_path: Path) -> None:
    """PEFT makes A and B by the class of the base's module; EfficientNet's takes other arguments."""
    config = hf.EfficientNetConfig(
        image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, num_labels=3
    )
    _fill(hf.EfficientNetForImageClassification(config)).save_pretrained(tmp_path / "checkpoint")
    package = export(tmp_path / "checkpoint", tmp_path / "package", targets="all")
    assert any(name.endswith("expand_conv") for name in package.points)
    assert not any(name.endswith("depthwise_conv.depthwise_conv") for name in package.points)
    assert any("is not made as a convolution is" in node.reason for node in package.graph().unplaced)
