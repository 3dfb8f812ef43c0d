"""PEFT's methods that change weights in other ways than by factors, on every kind of module that PEFT puts them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from onnx_lora import read_adapter
from onnx_lora.adapters.methods.fourierft import FourierFT
from onnx_lora.adapters.methods.shira import SHiRA
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.kinds import LINEAR, Conv
from tests.adapters.building import numbers
from tests.adapters.merging import (
    assert_is_peft,
    assert_no_tensor_is_ignored,
    assert_refuses_other_shapes,
    inputs,
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

OFT = {"target_modules": ["lin", "wide"], "init_weights": False}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3, outputs": ("IA3", {"target_modules": ["lin", "wide", "mlp"], "feedforward_modules": []}),
    "ia3, inputs": ("IA3", {"target_modules": ["lin", "mlp"], "feedforward_modules": ["lin", "mlp"]}),
    "ia3, convolutions": ("IA3", {"target_modules": ["conv2", "conv3"], "feedforward_modules": ["conv3"]}),
    "ia3, a convolution in groups": ("IA3", {"target_modules": ["grouped"], "feedforward_modules": ["grouped"]}),
    "ia3, by expression": ("IA3", {"target_modules": ["lin", "wide"], "feedforward_modules": "w.*"}),
    "oft": ("OFT", {**OFT, "oft_block_size": 4}),
    "oft, by number of blocks": ("OFT", {**OFT, "r": 3, "oft_block_size": 0}),
    "oft, one block for all": ("OFT", {**OFT, "oft_block_size": 4, "block_share": True}),
    "oft, constrained": ("OFT", {**OFT, "oft_block_size": 4, "coft": True, "eps": 0.2}),
    "oft, inverse": ("OFT", {**OFT, "oft_block_size": 4, "use_cayley_neumann": False}),
    "oft, 2 terms": ("OFT", {**OFT, "oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    "oft, 3 terms": ("OFT", {**OFT, "oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft, 8 terms": ("OFT", {**OFT, "oft_block_size": 4, "num_cayley_neumann_terms": 8}),
    "oft, embedding": ("OFT", {**OFT, "oft_block_size": 4, "target_modules": ["emb", "lin"]}),
    "oft, pointwise convolution": ("OFT", {**OFT, "oft_block_size": 2, "target_modules": ["point"]}),
    "boft": ("BOFT", {"boft_block_size": 4, "target_modules": ["lin", "wide"], "init_weights": False}),
    "boft, convolutions": ("BOFT", {"boft_block_size": 4, "target_modules": ["point"], "init_weights": False}),
    "hra": ("HRA", {"r": 3, "target_modules": ["lin", "wide"], "init_weights": False}),
    "hra, orthogonal": ("HRA", {"r": 3, "apply_GS": True, "target_modules": ["lin", "wide"], "init_weights": False}),
    "hra, convolutions": ("HRA", {"r": 2, "target_modules": ["conv2", "point"], "init_weights": False}),
    "hra, of a rank that folds": ("HRA", {"r": 10, "target_modules": ["lin"], "init_weights": False}),
    "hira": ("Hira", {"r": 2, "target_modules": ["lin", "wide", "mlp"], "init_weights": False}),
    "hira, patterns": ("Hira", {"r": 2, "target_modules": ["lin", "wide"], "rank_pattern": {"wide": 3}}),
    "hira, embedding": ("Hira", {"r": 2, "target_modules": ["emb"], "init_weights": False}),
    "hira, convolutions": ("Hira", {"r": 2, "target_modules": ["conv1", "conv2", "point", "conv3"]}),
    "shira": ("Shira", {"r": 2, "target_modules": ["lin", "wide"], "init_weights": False}),
    "super-tuning": ("Supertuning", {"sparsity": 0.8, "target_modules": ["lin", "wide"], "init_weights": False}),
    "supertuning, of the smallest": ("Supertuning", {"sparsity": 0.5, "select_top": False, "target_modules": ["lin"]}),
    "supertuning, with factors": (
        "Supertuning",
        {"r": 2, "lora_alpha": 3, "sparsity": 0.8, "target_modules": ["wide"]},
    ),
    "fourierft": ("FourierFT", {"n_frequency": 20, "target_modules": ["lin", "wide", "mlp"]}),
    "fourierft, patterns": (
        "FourierFT",
        {"n_frequency": 20, "target_modules": ["lin", "wide"], "random_loc_seed": 12345678901}
        | {"n_frequency_pattern": {"wide": 9}, "scaling": 3.5},
    ),
    "beft": ("Beft", {"target_modules": ["lin"], "init_weights": False}),
    "c3a": ("C3A", {"block_size": 4, "target_modules": ["lin", "wide"], "init_weights": False}),
    "c3a, patterns": ("C3A", {"block_size": 4, "target_modules": ["lin", "wide"], "block_size_pattern": {"wide": 12}}),
}


@pytest.mark.parametrize("name, settings", CASES.values(), ids=CASES.keys())
def test_it_is_what_peft_merges_and_computes(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    config = getattr(peft, f"{name}Config")(**settings)
    adapter = assert_is_peft(wrapped(config), tmp_path)
    assert_refuses_other_shapes(adapter, net())
    assert_no_tensor_is_ignored(tmp_path)


def test_iaas_output_vector_is_a_scale_of_outputs_and_of_the_bias(tmp_path: Path) -> None:
    adapter = saved(wrapped(peft.IA3Config(target_modules=["lin", "mlp"], feedforward_modules=["mlp"])), tmp_path)
    scale = adapter.changes["lin"].output_scale()
    assert scale is not None
    assert adapter.changes["mlp"].output_scale() is None
    assert {name: whole.operation for name, whole in adapter.replacements.items()} == {"lin.bias": "multiply"}
    assert_close(adapter.replacements["lin.bias"].value, scale)


def test_ia3_whose_config_and_shapes_disagree_is_refused(tmp_path: Path) -> None:
    tensors = {"m.q.ia3_l": numbers(6, 1), "m.v.ia3_l": numbers(1, 1)}
    with pytest.raises(AdapterFileError) as error:
        read_adapter(method_folder(tmp_path, tensors, "IA3", feedforward_modules=["q"]))
    assert "otherwise than the shape" in str(error.value)
    with pytest.raises(AdapterFileError, match=r"m.v: .* must say whether inputs or outputs"):
        read_adapter(method_folder(tmp_path, tensors, "IA3"))


def test_super_tuning_without_its_places_is_refused(tmp_path: Path) -> None:
    config = peft.SupertuningConfig(target_modules=["lin"], sparsity=0.5, save_precomputed_indices=False)
    wrapped(config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="save it again with save_precomputed_indices=True"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "tensors, fields, words",
    [
        ({"supertuning_indices": np.array([1, 2, 3])}, {}, "must have a place for each value"),
        ({"supertuning_indices": np.array([0.5, 2.0])}, {}, "places must be whole"),
        ({}, {"r": 2, "lora_alpha": 4}, "has no supertuning_lora_A"),
        ({"supertuning_lora_A.weight": numbers(2, 6), "supertuning_lora_B.weight": numbers(4, 2)}, {}, "ignore it"),
        (
            {"supertuning_lora_A.weight": numbers(2, 6), "supertuning_lora_B.weight": numbers(4, 2)},
            {"r": 3, "lora_alpha": 4},
            "a pair of factors of the config's r, 3",
        ),
    ],
)
def test_super_tuning_whose_tensors_make_no_sense_is_refused(
    tmp_path: Path, tensors: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    whole = {"supertuning_indices": np.array([1, 2]), "supertuning_values": numbers(2), **tensors}
    folder = method_folder(tmp_path, {f"m.q.{name}": value for name, value in whole.items()}, "SUPERTUNING", **fields)
    with pytest.raises(AdapterFileError, match=words):
        read_adapter(folder)


def test_layer_norms_are_whole_weights(tmp_path: Path) -> None:
    adapter = assert_is_peft(wrapped(peft.LNTuningConfig(target_modules=["norm"])), tmp_path)
    assert set(adapter.replacements) == {"norm.weight", "norm.bias"}
    assert not adapter.replacements["norm.weight"].in_place


def test_oft_on_a_kernel_is_refused_because_peft_merges_another_thing(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=4, target_modules=["conv2"], init_weights=False)
    model = wrapped(config)
    problem = saved(model, tmp_path).changes["conv2"].explain_misfit((6, 4, 3, 3), Conv((3, 3))) or ""
    assert "its own merge is another thing" in problem
    with torch.no_grad():
        unmerged, merged = model(*inputs())[7], model.merge_and_unload()(*inputs())[7]
    assert float((unmerged - merged).abs().max()) > 0.1


@pytest.mark.parametrize("version", ["0.17.1", None, "none"])
def test_ofts_series_of_older_pefts_is_refused(tmp_path: Path, version: str | None) -> None:
    config = {"oft_block_size": 4, "num_cayley_neumann_terms": 5, "use_cayley_neumann": True, "peft_version": version}
    with pytest.raises(AdapterFileError, match=r"PEFT 0\.18 made another series"):
        read_adapter(method_folder(tmp_path, {"m.q.oft_R.weight": numbers(2, 6)}, "OFT", **config))


def test_old_ofts_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"m\.q\.oft_r: OFT's of PEFT before 0\.14"):
        read_adapter(method_folder(tmp_path, {"m.q.oft_r": numbers(2, 6)}, "OFT"))


class Kernel:
    """PEFT's kernel for a GPU, by what it computes."""

    def forward(self, blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize(
    "factors, blocks, targets",
    [(2, 2, ["lin", "wide"]), (2, 6, ["lin"]), (2, 6, ["conv2"]), (2, 2, ["point"])],
)
def test_bofts_butterflies_are_pefts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factors: int, blocks: int, targets: list[str]
) -> None:
    """More than one factor, which PEFT makes on a GPU only."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", Kernel)
    config = peft.BOFTConfig(
        boft_n_butterfly_factor=factors,
        boft_block_num=blocks,
        boft_block_size=0,
        target_modules=targets,
        init_weights=False,
    )
    assert_is_peft(wrapped(config), tmp_path)


def test_bofts_three_factors_are_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", Kernel)
    base = torch.nn.Sequential(torch.nn.Linear(32, 5))
    weight = base[0].weight.detach().numpy().copy()
    config = peft.BOFTConfig(boft_n_butterfly_factor=3, boft_block_size=4, target_modules=["0"], init_weights=False)
    model = wrapped(config, model=base)
    change = saved(model, tmp_path).changes["0"]
    with torch.no_grad():
        assert_close(change.apply_to(weight), model.merge_and_unload()[0].weight.numpy())


def test_boft_of_blocks_that_do_not_mix_is_named(tmp_path: Path) -> None:
    tensors = {"m.q.boft_R": numbers(2, 3, 2, 2), "m.q.boft_s": numbers(6, 1)}
    change = read_adapter(method_folder(tmp_path, tensors, "BOFT")).changes["m.q"]
    assert "even blocks in multiples of 2, and has 3 of 2" in (change.explain_misfit((6, 6), LINEAR) or "")


def test_a_reflection_needs_a_direction(tmp_path: Path) -> None:
    columns = numbers(4, 2)
    columns[:, 1] = 0
    with pytest.raises(AdapterFileError, match="no direction to reflect along"):
        read_adapter(method_folder(tmp_path, {"m.q.hra_u": columns}, "HRA", r=2))


@pytest.mark.parametrize("count, size", [(1, 1), (5, 5), (20, 288), (1000, 589824), (7, 2**24)])
@pytest.mark.parametrize("seed", [0, 777, 2**32 - 1, 2**40 + 3])
def test_frequencies_lie_where_pytorch_draws_them(count: int, size: int, seed: int) -> None:
    from onnx_lora.adapters.methods.fourierft import _first_of_permutation

    if size > 10**6 and seed != 777:
        pytest.skip("one permutation of that size is enough")
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    assert np.array_equal(_first_of_permutation(seed, size, count), expected.numpy())


def test_a_weight_of_which_pytorch_draws_in_another_way_is_refused() -> None:
    assert "another way" in (FourierFT(np.float32([1]), 1.0, 7).explain_misfit((20000, 20000), LINEAR) or "")


def test_shiras_places_may_be_floating_point(tmp_path: Path) -> None:
    """As PEFT saves them on Windows."""
    adapter = saved(wrapped(peft.ShiraConfig(r=2, target_modules=["lin"], init_weights=False)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: values.astype(np.float32) for name, values in load_file(file).items()}, file)
    assert np.array_equal(read_adapter(tmp_path).changes["lin"].places, adapter.changes["lin"].places)


def test_the_values_of_one_place_add_up() -> None:
    change = SHiRA(np.array([[0, 0], [1, 1]]), np.float32([1, 2]))
    assert np.array_equal(change.apply_to(np.zeros((1, 2), np.float32)), [[0, 3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, target_modules=["lin"], init_weights=False),
        peft.IA3Config(target_modules=["lin"], feedforward_modules=[]),
        peft.HiraConfig(r=2, target_modules=["lin"], init_weights=False),
    ],
    ids=["loha", "ia3", "hira"],
)
def test_half_precision_is_computed_in_float32(tmp_path: Path, dtype: Any, config: Any) -> None:
    model = wrapped(config, dtype=dtype)
    state = weights_with(net(dtype).float(), saved(model, tmp_path))
    assert state["lin.weight"].dtype == np.float32
    with torch.no_grad():
        assert_close(
            state["lin.weight"], model.merge_and_unload().state_dict()["lin.weight"].float().numpy(), dtype="float16"
        )
