"""A model as a class that fuses q, k, v and gate, up (Phi-3) and as one that does not (Llama), of the same weights:
what PEFT computes with an adapter of the one, a package of the other computes too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.subject import make_tokenizer
from onnx_lora import AdapterSession, Package, bind, fold, read_adapter, write_adapter
from onnx_lora.exporter import export
from tests.support.numbers import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
FUSED = ["qkv_proj", "gate_up_proj", "o_proj"]
SPLIT = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj"]


@dataclass(frozen=True)
class Bases:
    """The folders of the two checkpoints."""

    fused: Path
    split: Path


def _unfused(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Phi-3's weights as Llama has them."""
    found: dict[str, torch.Tensor] = {}
    for name, values in weights.items():
        for fused, parts, sizes in (
            ("qkv_proj", SPLIT[:3], [64, 32, 32]),
            ("gate_up_proj", SPLIT[3:5], [48, 48]),
        ):
            if fused in name:
                pieces = zip(parts, values.split(sizes), strict=True)
                found.update({name.replace(fused, part): piece.clone() for part, piece in pieces})
                break
        else:
            found[name] = values
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("fused")
    torch.manual_seed(0)
    fused = hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, original_max_position_embeddings=64))
    split = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rms_norm_eps=fused.config.rms_norm_eps))
    split.load_state_dict(_unfused(fused.state_dict()))
    found = Bases(folder / "fused", folder / "split")
    for model, path in ((fused, found.fused), (split, found.split)):
        model.save_pretrained(path)
        make_tokenizer(path)
    return found


@pytest.fixture(scope="module", params=["fused, optimum", "split, optimum", "fused, genai", "split, genai"])
def package(bases: Bases, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    which, exporter = request.param.split(", ")
    if exporter == "genai":
        pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI: pip install onnx-lora[genai]")
    out = tmp_path_factory.mktemp("package") / f"{which}-{exporter}"
    return export(getattr(bases, which), out, via=exporter, dora=True, verify=False)


def _train(base: Path, out: Path, **more: Any) -> Any:
    model = hf.AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(3)
    tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, **{"r": 4, "lora_alpha": 6, **more})).eval()
    tuned.save_pretrained(out)
    return tuned


def _logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


def _feeds(session: AdapterSession) -> dict[str, Any]:
    feeds: dict[str, Any] = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for value in session.get_inputs():
        if "past" in value.name:
            feeds[value.name] = np.zeros((2, 2, 0, 16), np.float32)
        elif value.name == "position_ids":
            feeds[value.name] = np.array([[0, 1, 2, 3]] * 2)
    return feeds


# What is trained, by whether the class that it is trained on is the fused one.
TRAININGS: dict[str, dict[bool, dict[str, Any]]] = {
    "all": {True: {"target_modules": FUSED}, False: {"target_modules": SPLIT}},
    "some": {True: {"target_modules": ["qkv_proj"]}, False: {"target_modules": ["q_proj", "v_proj", "up_proj"]}},
    "rsLoRA": {
        True: {"target_modules": FUSED, "use_rslora": True},
        False: {"target_modules": SPLIT, "use_rslora": True},
    },
    "DoRA": {True: {"target_modules": FUSED, "use_dora": True}, False: {"target_modules": SPLIT, "use_dora": True}},
    "patterns": {
        True: {"target_modules": FUSED, "rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}},
        False: {
            "target_modules": SPLIT,
            "rank_pattern": {"k_proj": 2, "up_proj": 8},
            "alpha_pattern": {"q_proj": 3},
        },
    },
}


@pytest.mark.parametrize("training", TRAININGS)
def test_an_adapter_of_the_other_class_equals_peft(
    bases: Bases, package: Package, tmp_path: Path, training: str
) -> None:
    is_fused_here = package.name.startswith("fused")
    base = bases.split if is_fused_here else bases.fused
    expected = _logits(_train(base, tmp_path / "a", **TRAININGS[training][not is_fused_here]))
    bound = bind(read_adapter(tmp_path / "a"), package)
    session = AdapterSession(package)
    session.load_adapter("a", bound)
    feeds = _feeds(session)
    assert_close(session.run(["logits"], feeds, adapter="a")[0], expected)
    assert_close(fold(package, bound).run(["logits"], feeds)[0], expected)
    # The same adapter as one of the package's own class, read by PEFT.
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "own", format="peft", package=package)
    own = hf.AutoModelForCausalLM.from_pretrained(bases.fused if is_fused_here else bases.split)
    assert_close(_logits(PeftModel.from_pretrained(own, tmp_path / "own").eval()), expected)
