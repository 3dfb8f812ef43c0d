"""What is read from a PEFT folder is what PEFT itself computes from it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from onnx_lora import read_adapter
from tests.support.numbers import assert_close, assert_same_bits

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 6)
        self.v_proj = torch.nn.Linear(8, 5)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = Conv1D(7, 8)


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(8, 8)
        self.out_proj = torch.nn.Linear(8, 3)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Layer() for _ in range(3)])})
        self.classifier = Head()

    def forward(self, x):
        return self.classifier.out_proj(x)


def trained(tmp_path: Path, *, dtype=torch.float32, safe: bool = True, **config):
    """The folder of an adapter with random A and B, and what PEFT loads from it."""
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | config
    model = peft.get_peft_model(Tiny().to(dtype), peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or (config.get("bias", "none") != "none" and name.endswith("bias")):
                parameter.add_(1.0)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder, safe_serialization=safe)
    return peft.PeftModel.from_pretrained(Tiny().to(dtype), folder, autocast_adapter_dtype=False), folder


CASES = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "alpha is a fraction": {"lora_alpha": 0.5},
    "rank one": {"r": 1},
    "rank beyond the sizes": {"r": 1000},
    "patterns": {
        "rank_pattern": {"layers.1.attn.q_proj": 4, r"layers\.\d\.attn\.v_proj": 5},
        "alpha_pattern": {r"layers\.[01]\.attn\.q_proj": 9, "^q_proj": 100, "q_proj": 7},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 2}},
    "conv1d": {"target_modules": ["mlp", "q_proj"], "fan_in_fan_out": True},
    "conv1d without fan_in_fan_out": {"target_modules": ["mlp"], "fan_in_fan_out": False},
    "layers": {"layers_to_transform": [0, 2]},
    "one layer with its pattern": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["body.layers.1.attn.q_proj", "v_proj"]},
    "excluded by expression": {"exclude_modules": r".*layers\.0\..*"},
    "expression": {"target_modules": r".*\.[12]\..*q_proj"},
    "all linear": {"target_modules": "all-linear"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "pickle": {"safe": False},
    "bfloat16 pickle": {"safe": False, "dtype": torch.bfloat16},
    "modules to save": {"modules_to_save": ["classifier"]},
    "biases of LoRA's modules": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_deltas_are_those_of_peft(tmp_path: Path, config: dict) -> None:
    model, folder = trained(tmp_path, **config)
    adapter = read_adapter(folder)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(adapter.deltas) == set(layers) != set()
    for name, layer in layers.items():
        delta = adapter.deltas[name]
        assert delta.scale == layer.scaling["default"]
        # Multiplied in float32, as PEFT would in a wider type.
        factors = (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()).detach()
        expected = factors.numpy() * layer.scaling["default"]
        actual = delta.b.astype(np.float64) @ delta.a.astype(np.float64) * delta.scale
        assert_close(actual, expected, dtype="float64")
        if config.get("dtype") is None:
            own = layer.get_delta_weight("default").detach().numpy()
            assert_close(actual.astype(np.float32), own.T if isinstance(layer.get_base_layer(), Conv1D) else own)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_whole_weights_are_those_of_peft(tmp_path: Path, config: dict) -> None:
    """Every parameter of the merged model that is not the base's comes with the adapter."""
    _, folder = trained(tmp_path, **config)
    adapter = read_adapter(folder)
    torch.manual_seed(0)
    base = Tiny().to(config.get("dtype", torch.float32))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with torch.no_grad():
        for name, value in before.items():
            delta = adapter.deltas.get(name.removesuffix(".weight"))
            if delta is not None and name.endswith(".weight"):
                product = delta.b.astype(np.float64) @ delta.a.astype(np.float64) * delta.scale
                value += torch.from_numpy(product.T if name.endswith("mlp.weight") else product).to(value.dtype)
            if name in adapter.replacements:
                value.copy_(torch.from_numpy(np.array(adapter.replacements[name].value)))
    merged = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).merge_and_unload()
    tolerance = "float16" if config.get("dtype") in (torch.float16, torch.bfloat16) else "float32"
    for name, value in merged.state_dict().items():
        assert_close(before[name].double().numpy(), value.double().numpy(), dtype=tolerance)


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    model, folder = trained(tmp_path, dtype=torch.bfloat16)
    layer = model.base_model.model.body.layers[0].attn.q_proj
    expected = layer.lora_A["default"].weight.detach().float().numpy()
    assert_same_bits(read_adapter(folder).deltas["body.layers.0.attn.q_proj"].a, expected)


def test_both_torch_layouts_read_the_same(tmp_path: Path) -> None:
    _, folder = trained(tmp_path, safe=False)
    new = read_adapter(folder)
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    torch.save(state, folder / "adapter_model.bin", _use_new_zipfile_serialization=False)
    old = read_adapter(folder)
    for module, delta in new.deltas.items():
        assert_same_bits(old.deltas[module].a, delta.a)
        assert_same_bits(old.deltas[module].b, delta.b)


@pytest.mark.parametrize("zipped", [True, False])
def test_strides_of_a_pickled_tensor_count(tmp_path: Path, zipped: bool) -> None:
    _, folder = trained(tmp_path, safe=False)
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    expected = {key: value.clone() for key, value in state.items()}
    for key, value in state.items():
        wide = torch.zeros(value.shape[1], value.shape[0] + 3, dtype=value.dtype)
        wide[:, 2:-1] = value.T
        state[key] = wide[:, 2:-1].T
    torch.save(state, folder / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    key = "base_model.model.body.layers.0.attn.q_proj.lora_B.weight"
    assert_same_bits(
        np.ascontiguousarray(read_adapter(folder).deltas["body.layers.0.attn.q_proj"].b), expected[key].numpy()
    )


def test_parameters_and_ordered_dicts_are_read_too(tmp_path: Path) -> None:
    model, folder = trained(tmp_path, safe=False)
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    ordered = type(model.state_dict())((key, torch.nn.Parameter(value)) for key, value in state.items())
    ordered._metadata = {"": {"version": 1}}
    torch.save(ordered, folder / "adapter_model.bin")
    assert len(read_adapter(folder).deltas) == 6


def test_pissa_that_peft_converted_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        Tiny(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        model.base_model.model.body.layers[0].attn.q_proj.lora_B["default"].weight.add_(0.5)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.deltas["body.layers.0.attn.q_proj"].a.shape[0] == 4
    loaded = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "adapter")
    layer = loaded.base_model.model.body.layers[0].attn.q_proj
    delta = adapter.deltas["body.layers.0.attn.q_proj"]
    assert_close(delta.b @ delta.a * np.float32(delta.scale), layer.get_delta_weight("default").detach().numpy())
