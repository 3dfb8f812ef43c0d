"""PEFT's methods that add products of factors, on every kind of module that PEFT puts them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onnx_lora import read_adapter
from onnx_lora.errors import AdapterFileError
from tests.adapters.building import numbers
from tests.adapters.merging import (
    assert_is_peft,
    assert_no_tensor_is_ignored,
    assert_refuses_other_shapes,
    method_folder,
    net,
    peft,
    saved,
    torch,
    weights_with,
    wrapped,
)
from tests.support.numbers import assert_close

pytestmark = [pytest.mark.filterwarnings("ignore")]

CONV = ["conv1", "conv2", "point"]
ADALORA = {"init_r": 3, "target_r": 2, "total_step": 10, "lora_alpha": 5, "init_lora_weights": False}
RANDOM = {"init_weights": False, "target_modules": ["lin", "wide", "mlp"]}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "loha, linear": ("LoHa", {"r": 2, "alpha": 3, "target_modules": ["lin", "wide"], "init_weights": False}),
    "loha, rank patterns": (
        "LoHa",
        {"r": 2, "target_modules": ["lin", "wide"], "rank_pattern": {"lin": 1}, "alpha_pattern": {"wide": 5}},
    ),
    "loha, convolutions": ("LoHa", {"r": 2, "target_modules": CONV, "init_weights": False}),
    "loha, convolutions by modes": (
        "LoHa",
        {"r": 2, "target_modules": CONV, "use_effective_conv2d": True, "init_weights": False},
    ),
    "loha, of a rank that folds": ("LoHa", {"r": 9, "target_modules": ["lin"], "init_weights": False}),
    "lokr, linear": ("LoKr", {"r": 1, "alpha": 3, "target_modules": ["lin", "wide"], "init_weights": False}),
    "lokr, whole second": ("LoKr", {"r": 8, "target_modules": ["lin", "wide"], "init_weights": False}),
    "lokr, both decomposed": (
        "LoKr",
        {"r": 1, "target_modules": ["lin", "wide"], "decompose_both": True, "init_weights": "lycoris"},
    ),
    "lokr, factor": ("LoKr", {"r": 1, "target_modules": ["lin", "wide"], "decompose_factor": 2, "init_weights": False}),
    "lokr, patterns": (
        "LoKr",
        {"r": 1, "target_modules": ["lin", "wide"], "rank_pattern": {"wide": 2}, "alpha_pattern": {"lin": 1}},
    ),
    "lokr, convolutions": ("LoKr", {"r": 1, "target_modules": CONV, "init_weights": False}),
    "lokr, convolutions by modes": (
        "LoKr",
        {"r": 1, "target_modules": ["conv2", "point"], "use_effective_conv2d": True, "init_weights": False}
        | {"decompose_factor": 2},  # PyTorch's kron fails on what PEFT gives it for a Conv1d
    ),
    "lokr, convolutions whole": ("LoKr", {"r": 8, "target_modules": CONV, "init_weights": False}),
    "adalora, linear": ("AdaLora", {**ADALORA, "target_modules": ["lin", "mlp"]}),
    "adalora, conv2d": ("AdaLora", {**ADALORA, "target_modules": ["conv2", "point"]}),
    "adalora without alpha": ("AdaLora", {**ADALORA, "target_modules": ["lin"], "lora_alpha": 0}),
    "vera": ("Vera", {"r": 3, **RANDOM}),
    "vera, of a rank that folds": ("Vera", {"r": 64, **RANDOM}),
    "pvera": ("Pvera", {"r": 3, **RANDOM}),
    "vblora": ("VBLoRA", {"r": 2, "vector_length": 2, "num_vectors": 7, "topk": 2, "target_modules": ["lin", "mlp"]}),
    "vblora, only the largest saved": (
        "VBLoRA",
        {"r": 2, "vector_length": 2, "num_vectors": 7, "topk": 3, "target_modules": ["lin", "mlp"]}
        | {"save_only_topk_weights": True},
    ),
    "randlora": ("RandLora", {"r": 4, "randlora_alpha": 3, **RANDOM}),
    "randlora, of a rank that does not divide": ("RandLora", {"r": 5, **RANDOM}),
    "randlora, sparse": ("RandLora", {"r": 4, "sparse": True, **RANDOM}),
    "delora": ("Delora", {"r": 2, "target_modules": ["lin", "wide"], "init_weights": False}),
    "delora, patterns": (
        "Delora",
        {"r": 2, "target_modules": ["lin", "wide"], "rank_pattern": {"wide": 3}, "lambda_pattern": {"lin": 4}},
    ),
    "gralora": ("Gralora", {"r": 2, "alpha": 3, "gralora_k": 2, **RANDOM}),
    "gralora, hybrid": ("Gralora", {"r": 4, "gralora_k": 2, "hybrid_r": 1, **RANDOM}),
    "miss": ("Miss", {"r": 5, "target_modules": ["lin", "wide"]}),
    "miss, mini": ("Miss", {"r": 4, "mini_r": 4, "init_weights": "mini", "target_modules": ["lin", "wide"]}),
    "miss, bat": ("Miss", {"r": 4, "init_weights": "bat", "target_modules": ["lin", "wide"]}),
}


@pytest.mark.parametrize("name, settings", CASES.values(), ids=CASES.keys())
def test_it_is_what_peft_merges_and_computes(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    config = getattr(peft, f"{name}Config")(**settings)
    adapter = assert_is_peft(wrapped(config), tmp_path)
    assert_refuses_other_shapes(adapter, net())
    assert_no_tensor_is_ignored(tmp_path)


# --- AdaLoRA -----------------------------------------------------------------------------------------


def pruned(folder: Path, **pattern: list[bool]) -> Any:
    """An AdaLoRA folder whose ranks were pruned, and what PEFT makes of it."""
    model = wrapped(peft.AdaLoraConfig(**ADALORA, target_modules=["lin", "mlp"]))
    marks = {f"{module}.lora_E": kept for module, kept in pattern.items()}
    model.peft_config["default"].rank_pattern = marks
    model.save_pretrained(folder)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(net(), folder).merge_and_unload().state_dict()


def test_adalora_keeps_its_first_rank_in_the_scale(tmp_path: Path) -> None:
    reference = pruned(tmp_path, lin=[True, False, True], mlp=[True, True, True])
    state = weights_with(net(), read_adapter(tmp_path))
    for name, value in reference.items():
        assert_close(np.asarray(state[name]), value.numpy())


def test_adalora_pruned_to_nothing_stays_at_the_base(tmp_path: Path) -> None:
    reference = pruned(tmp_path, lin=[False, False, False], mlp=[True, True, True])
    adapter = read_adapter(tmp_path)
    assert set(adapter.deltas) == {"mlp"}
    assert "lin: AdaLoRA pruned it to rank 0" in adapter.notes[0]
    assert_close(reference["lin.weight"].numpy(), net().lin.weight.detach().numpy())


def test_adalora_of_old_files_brings_its_ranknum(tmp_path: Path) -> None:
    tensors = {"lin.lora_A": numbers(3, 4), "lin.lora_B": numbers(6, 3), "lin.lora_E": numbers(3, 1)}
    tensors["lin.ranknum"] = np.float32([2])
    folder = method_folder(tmp_path, tensors, "ADALORA", init_r=3, target_modules=["lin"], lora_alpha=8)
    delta = read_adapter(folder).deltas["lin"]
    assert delta.scale == 8 / (2 + 1e-5)
    assert_close(np.array(delta.a), tensors["lin.lora_A"] * tensors["lin.lora_E"])


# --- the bank and the projections ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Vera", "Pvera", "RandLora"])
def test_projections_that_are_not_in_the_file_are_asked_for(tmp_path: Path, name: str) -> None:
    config = getattr(peft, f"{name}Config")(r=3, save_projection=False, target_modules=["lin"])
    with pytest.raises(
        AdapterFileError, match=r"which all modules share, .*save_projection=False.; save it again"
    ) as error:
        saved(wrapped(config), tmp_path)
    assert len(error.value.problems) == 1


def vblora_folder(folder: Path, **changes: Any) -> Path:
    tensors = {
        "base_model.vblora_vector_bank": numbers(5, 2),
        "base_model.model.m.q.vblora_logits_A": numbers(2, 2, 5, seed=3),
        "base_model.model.m.q.vblora_logits_B": numbers(3, 2, 5, seed=4),
    }
    return method_folder(folder, tensors | changes, "VBLORA", topk=2, r=2)


def test_logits_that_do_not_tell_which_vectors_count_are_refused(tmp_path: Path) -> None:
    logits = np.tile(np.float32([3, 1, 1, 0, 0]), (2, 2, 1))
    with pytest.raises(AdapterFileError, match="equal logits where only the largest 2 count"):
        read_adapter(vblora_folder(tmp_path, **{"base_model.model.m.q.vblora_logits_A": logits}))


@pytest.mark.parametrize(
    "indices, shares, words",
    [
        ([0, 0], [0.5], "each once"),
        ([0, 5], [0.5], "each once"),
        ([0, 1], [1.5], "of one whole"),
        ([0, 1], [0.5, 0.5], "shares of all but the last"),
    ],
)
def test_vectors_of_a_bank_that_cannot_be_are_refused(
    tmp_path: Path, indices: list[int], shares: list[float], words: str
) -> None:
    key = "base_model.model.m.q.vblora_logits_A"
    changes = {
        f"{key}_topk_indices": np.tile(np.uint8(indices), (2, 2, 1)),
        f"{key}_topk_weights": np.tile(np.float32(shares), (2, 2, 1)),
    }
    folder = vblora_folder(tmp_path, **changes)
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=words):
        read_adapter(folder)


# --- what tensors and config must agree in -------------------------------------------------------------


@pytest.mark.parametrize(
    "method, tensors, config, words",
    [
        ("LOHA", {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4)}, {"r": 2, "alpha": 1}, "has no hada_w2_a"),
        (
            "LOHA",
            {"hada_w1_a": (6, 3), "hada_w1_b": (3, 4), "hada_w2_a": (6, 3), "hada_w2_b": (3, 4)},
            {"r": 2, "alpha": 1},
            "the rank must be 2 .* hada_w1_a .6, 3.",
        ),
        (
            "LOHA",
            {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)},
            {"r": 2, "alpha": 1},
            "must have one shape",
        ),
        ("LOKR", {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2)}, {"r": 2, "alpha": 1}, "has no lokr_w2_b"),
        (
            "LOKR",
            {"lokr_w1": (2, 2), "lokr_w2": (3, 2), "lokr_w2_a": (3, 2)},
            {"r": 2, "alpha": 1},
            "lokr_w2 must be whole, or made of factors",
        ),
        ("LOKR", {"lokr_w1": (2, 2, 1), "lokr_w2": (3, 2)}, {"r": 2, "alpha": 1}, "lokr_w1 must have 2 axes"),
        (
            "ADALORA",
            {"lora_A": (3, 4), "lora_B": (6, 3), "lora_E": (3, 1)},
            {"init_r": 4, "lora_alpha": 1},
            "the rank must be 4 by init_r",
        ),
        (
            "DELORA",
            {"delora_A": (2, 4), "delora_B": (6, 2), "delora_lambda": (1,), "delora_w_norm": (5,)},
            {"r": 2},
            "DeLoRA's tensors must fit",
        ),
        (
            "GRALORA",
            {"gralora_A": (2, 2, 3), "gralora_B": (2, 3, 3)},
            {"r": 3, "alpha": 1, "gralora_k": 2, "hybrid_r": 0},
            "a multiple of that",
        ),
        ("MISS", {"miss_block": (3, 6)}, {"r": 2}, "the config's r, 2"),
        ("MISS", {"miss_block": (2, 6)}, {"r": 2, "init_weights": "novel"}, "'novel' of MiSS is not known"),
        ("PVERA", {"pvera_lambda_d": (4,), "pvera_lambda_b": (6,)}, {"sample_at_inference": True}, "every run another"),
    ],
)
def test_tensors_that_make_no_sense_are_refused_by_name(
    tmp_path: Path, method: str, tensors: dict[str, tuple[int, ...]], config: dict[str, Any], words: str
) -> None:
    folder = {f"base_model.model.m.q.{name}": numbers(*shape) for name, shape in tensors.items()}
    if method == "PVERA":
        folder |= {"base_model.pvera_A": numbers(4, 4), "base_model.pvera_B": numbers(6, 2)}
    with pytest.raises(AdapterFileError, match=f"m.q: .*{words}"):
        read_adapter(method_folder(tmp_path, folder, method, **config))


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    block = numbers(2, 6)
    block[1, 1] = np.nan
    with pytest.raises(AdapterFileError, match=r"m\.q\.miss_block: 1 of 12 values are NaN or infinite"):
        read_adapter(method_folder(tmp_path, {"m.q.miss_block": block}, "MISS", r=2))
