"""The PEFT folders that are written: PEFT loads them and computes what the adapter's first folder computes, and reading
them again gives the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import read_adapter
from onnx_lora.adapters import Adapter, Delta, Replacement
from onnx_lora.adapters.write import write_adapter
from onnx_lora.errors import UnsupportedAdapterError
from tests.adapters.building import adapter, delta, numbers
from tests.adapters.merging import inputs, net, peft, saved, torch, wrapped
from tests.support.numbers import assert_close, assert_same_bits

pytestmark = [pytest.mark.filterwarnings("ignore")]

LINEAR = ["lin", "wide", "mlp"]
CONVOLUTIONS = ["conv1", "conv2", "point", "conv3"]

CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True, "r": 3, "lora_alpha": 16},
    "every kind": {"target_modules": ["emb", *LINEAR, *CONVOLUTIONS]},
    "a convolution in groups": {"target_modules": ["grouped", "lin"]},
    "patterns": {
        "target_modules": ["emb", "lin", "conv2"],
        "rank_pattern": {"emb": 3, "conv2": 5},
        "alpha_pattern": {"emb": 7, "lin": 0.5},
    },
    "dora": {"target_modules": [*LINEAR, *CONVOLUTIONS, "emb"], "use_dora": True},
    "saved modules": {"target_modules": ["lin"], "modules_to_save": ["norm", "head"]},
    "all biases": {"target_modules": ["lin"], "bias": "all"},
    "nothing but a saved module": {"target_modules": "dummy-target-modules", "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_peft_computes_the_same_with_the_folder_that_is_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = wrapped(peft.LoraConfig(**({"r": 2, "lora_alpha": 3, "init_lora_weights": False} | settings)))
    first = saved(model, tmp_path / "first")
    folder = write_adapter(first, tmp_path / "second", format="peft")
    again = peft.PeftModel.from_pretrained(net(), str(folder)).eval()
    with torch.no_grad():
        for own, reference in zip(again(*inputs()), model(*inputs()), strict=True):
            assert_close(own.numpy(), reference.numpy())
    assert_same(read_adapter(folder), first)


def assert_same(actual: Adapter, expected: Adapter) -> None:
    """Factors, scales and whole weights are the same; of a scale that no alpha gives, the product with B."""
    assert actual.deltas.keys() == expected.deltas.keys()
    for module, reference in expected.deltas.items():
        own = actual.deltas[module]
        assert (own.kind, own.magnitude is None) == (reference.kind, reference.magnitude is None)
        assert_same_bits(own.a, reference.a)
        assert_same_bits(scaled(own), scaled(reference))
        if own.magnitude is not None and reference.magnitude is not None:
            assert_same_bits(own.magnitude, reference.magnitude)
    assert actual.replacements.keys() == expected.replacements.keys()
    for name, whole in expected.replacements.items():
        assert actual.replacements[name].in_place == whole.in_place
        assert_same_bits(actual.replacements[name].value, whole.value)


def scaled(own: Delta) -> np.ndarray[Any, Any]:
    """B with the scale, as `bind` makes it."""
    return (own.b.astype(np.float64) * own.scale).astype(np.float32)


def test_patterns_name_their_module_and_no_other(tmp_path: Path) -> None:
    deltas = {"a.q": delta(4, 6), "b.a.q": delta(4, 6, rank=3), "c": Delta(numbers(2, 4), numbers(6, 2), 0.25)}
    folder = write_adapter(adapter(deltas), tmp_path / "out", format="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == {r"^b\.a\.q": 3}
    assert config["alpha_pattern"] == {r"^b\.a\.q": 3, "^c": 0.5}
    assert config["target_modules"] == ["a.q", "b.a.q", "c"]
    assert set(safetensors.numpy.load_file(folder / "adapter_model.safetensors")) == {
        f"base_model.model.{module}.lora_{side}.weight" for module in deltas for side in "AB"
    }


def test_every_scale_comes_back_bit_for_bit(tmp_path: Path) -> None:
    scales = np.random.default_rng(3).uniform(0.01, 30, 40)
    deltas = {
        f"m{index}": Delta(numbers(3, 4, seed=index), numbers(5, 3, seed=index), float(scale))
        for index, scale in enumerate(scales)
    }
    assert_same(read_adapter(write_adapter(adapter(deltas), tmp_path / "out", format="peft")), adapter(deltas))


DORA = Delta(numbers(2, 4), numbers(6, 2), 1.0, magnitude=numbers(6))


@pytest.mark.parametrize(
    "own, words",
    [
        (adapter({"q": DORA, "v": delta(4, 6)}), "v (and 0 more): has no DoRA, and q has"),
        (adapter({}, {"n.weight": Replacement(numbers(4), operation="add")}), "n.weight: is added to the base's own"),
        (adapter({}, {"n.bias": Replacement(numbers(4), operation="multiply")}), "n.bias: is multiplied with"),
        (adapter({"q": delta(4, 6)}, {"q.weight": numbers(6, 4)}), "q.weight: its module has factors too"),
        (adapter({}), "it holds nothing"),
    ],
)
def test_what_a_config_cannot_say_is_refused_by_name(tmp_path: Path, own: Adapter, words: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        write_adapter(own, tmp_path / "out", format="peft")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())
