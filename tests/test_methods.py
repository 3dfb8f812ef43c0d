"""PEFT's other methods, from its folder to the outputs: delta where it can be, and fold, equal PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from onnx_lora import AdapterSession, Package, bind, fold, read_adapter, write_bound
from onnx_lora.errors import BindError
from onnx_lora.exporter import export
from tests.support.exporters import VIA
from tests.support.numbers import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

X = torch.linspace(-1, 1, 3 * 4 * 12).view(3, 4, 12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    out = tmp_path_factory.mktemp("methods") / "net"
    return export(
        _net(), out, example_inputs=(X,), input_names=["x"], output_names=["y"], replaceable=["bias"], dora=True
    )


BOTH = ["up", "down"]
METHODS: dict[str, tuple[Any, bool]] = {  # the config, and whether it runs unfolded
    "loha": (peft.LoHaConfig(r=2, alpha=3, target_modules=BOTH, init_weights=False), True),
    "loha, of a high rank": (peft.LoHaConfig(r=6, alpha=3, target_modules=BOTH, init_weights=False), False),
    "lokr": (peft.LoKrConfig(r=2, alpha=3, target_modules=BOTH, init_weights=False), True),
    "ia3": (peft.IA3Config(target_modules=["up"], feedforward_modules=[]), True),
    "ia3, feedforward": (peft.IA3Config(target_modules=["down"], feedforward_modules=["down"]), False),
    "oft": (peft.OFTConfig(oft_block_size=4, target_modules=BOTH), False),
    "vera": (peft.VeraConfig(r=4, target_modules=["up"], save_projection=True), True),
    "hra": (peft.HRAConfig(r=2, target_modules=BOTH), True),
    "fourierft": (peft.FourierFTConfig(n_frequency=20, target_modules=BOTH), False),
    "beft": (peft.BeftConfig(target_modules=["up"], init_weights=False), True),
    "dora": (LoraConfig(r=2, target_modules=BOTH, use_dora=True, init_lora_weights=False), True),
    "lora with a bias": (LoraConfig(r=2, target_modules=["up"], lora_bias=True, init_lora_weights=False), True),
}


def _saved(folder: Path, config: Any) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(_net(), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.rand_like(parameter) + 0.05 * ("magnitude" in name)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_peft(method: str, package: Package, tmp_path: Path) -> None:
    config, runs = METHODS[method]
    folder = _saved(tmp_path / "a", config)
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(_net(), folder).eval()(X).numpy()  # type: ignore[arg-type]
        moved = np.abs(expected - _net()(X).numpy()).max()
    assert moved > 1e-2
    assert_close(fold(package, folder).run(None, {"x": X.numpy()})[0], expected)
    bound = bind(read_adapter(folder), package)
    assert bool(bound.coverage.fold_only) is not runs
    session = AdapterSession(package)
    if runs:
        session.load_adapter("a", write_bound(bound, tmp_path / "a.safetensors"))
        assert_close(session.run(None, {"x": X.numpy()}, adapter="a")[0], expected)
        return
    with pytest.raises(BindError, match="use fold or fold_to"):
        session.load_adapter("a", folder)
    with pytest.raises(BindError, match="use fold or fold_to"):
        write_bound(bound, tmp_path / "a.safetensors")


def test_beft_of_a_module_without_a_bias_is_refused(package: Package, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "a", peft.BeftConfig(target_modules=["up", "down"], init_weights=False))
    with pytest.raises(BindError, match=r"down\.bias: the module has no bias in this base"):
        bind(read_adapter(folder), package)


IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def _llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_reach_what_is_tied(tied: bool, tmp_path: Path) -> None:
    _llama(tied).save_pretrained(tmp_path / "base")
    model = get_peft_model(_llama(tied), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 9]))
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            parameter.data += 0.5
    model.eval().save_pretrained(tmp_path / "a")
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits.numpy()
    every = ["q_proj", "embed_tokens", "lm_head"]
    package = export(tmp_path / "base", tmp_path / "out", via=VIA, task="text-generation", targets=every)
    bound = bind(read_adapter(tmp_path / "a"), package)
    assert ("lm_head" in bound.coverage.applied) is tied
    feeds = {
        "input_ids": IDS.numpy(),
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.array([[0, 1, 2, 3]] * 2),
    }
    session = AdapterSession(package)
    session.load_adapter("a", bound)
    assert_close(session.run(["logits"], feeds, adapter="a")[0], expected)
    assert_close(fold(package, bound).run(["logits"], feeds)[0], expected)


def test_trained_tokens_are_refused_where_the_tied_head_has_no_point(tmp_path: Path) -> None:
    _llama(True).save_pretrained(tmp_path / "base")
    model = get_peft_model(_llama(True), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]))
    model.save_pretrained(tmp_path / "a")
    targets = ["q_proj", "embed_tokens"]
    package = export(tmp_path / "base", tmp_path / "out", via=VIA, targets=targets, verify=False)
    with pytest.raises(BindError, match=r"must change lm_head too, which is tied to it.* `targets=` including lm_head"):
        bind(read_adapter(tmp_path / "a"), package)


def test_the_method_of_trained_tokens_writes_the_tied_head_too(tmp_path: Path) -> None:
    _llama(True).save_pretrained(tmp_path / "base")
    config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 9])
    model = get_peft_model(_llama(True), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            parameter.data += 0.5
    model.eval().save_pretrained(tmp_path / "a")
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits.numpy()
    package = export(
        tmp_path / "base",
        tmp_path / "out",
        via=VIA,
        task="text-generation",
        targets=["all-linear", "lm_head", "embed_tokens"],
    )
    assert {"lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj"} <= set(package.points)
    session = AdapterSession(package)
    session.load_adapter("a", tmp_path / "a")
    feeds = {
        "input_ids": IDS.numpy(),
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.array([[0, 1, 2, 3]] * 2),
    }
    assert_close(session.run(["logits"], feeds, adapter="a")[0], expected)


class Experts(nn.Module):
    """A mixture whose experts are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.w)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 12)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(torch.tanh(self.gate(x)))


def test_lora_on_the_parameter_of_all_experts(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return Mixture().eval()

    x = torch.linspace(-1, 1, 2 * 4 * 12).view(2, 4, 12)
    shapes = ({1: torch.export.Dim("tokens")},)
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_shapes": shapes}
    package = export(model(), tmp_path / "out", example_inputs=(x,), replaceable=["experts.w"], **names)
    assert "experts.w" in package.replaceable
    config = LoraConfig(r=2, target_modules=["gate"], target_parameters=["experts.w"], init_lora_weights=False)
    tuned = get_peft_model(model(), config)
    tuned.save_pretrained(tmp_path / "a")
    with torch.inference_mode():
        expected = tuned.eval()(x).numpy()
    session = AdapterSession(package)
    bound = session.load_adapter("a", tmp_path / "a")
    assert bound.coverage.replaced == ("experts.w",)
    assert_close(session.run(None, {"x": x.numpy()}, adapter="a")[0], expected)
    assert_close(fold(package, bound).run(None, {"x": x.numpy()})[0], expected)
