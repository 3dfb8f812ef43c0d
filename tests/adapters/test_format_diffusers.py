"""Diffusers' files: every spelling since the first means the module that diffusers itself takes it for, and what is
written runs in diffusers with the same outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import read_adapter
from onnx_lora.adapters import Adapter, Delta
from onnx_lora.adapters.formats.diffusion.diffusers_names import METADATA
from onnx_lora.adapters.write import write_adapter
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.kinds import EMBEDDING, Conv
from onnx_lora.points import Array
from tests.adapters.building import adapter, delta, numbers
from tests.adapters.merging import applied, torch
from tests.support.numbers import assert_close, assert_same_bits

os.environ["HF_HUB_OFFLINE"] = "1"

A, B = np.array([[1, 2, 3], [4, 5, 6]], "f4"), np.array([[1, 0], [0, 2]], "f4")
PRODUCT = np.array([[1, 2, 3], [8, 10, 12]], "f8")  # B · A


def read(tmp_path: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> Adapter:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(safetensors.numpy.save(dict(tensors), metadata))
    return read_adapter(file)


def pair(module: str, a: Array = A, b: Array = B) -> dict[str, Array]:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def config(part: str, **fields: Any) -> dict[str, str]:
    whole = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "proj"], **fields}
    return {METADATA: json.dumps({f"{part}.{key}": value for key, value in whole.items()})}


# --- names -------------------------------------------------------------------------------------

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.0"
SPELLINGS = {
    f"unet.{BLOCK}.attn1.to_q.lora_A.weight": f"unet.{BLOCK}.attn1.to_q",
    f"unet.{BLOCK}.attn1.to_q.lora.down.weight": f"unet.{BLOCK}.attn1.to_q",
    f"unet.{BLOCK}.attn1.processor.to_k_lora.down.weight": f"unet.{BLOCK}.attn1.to_k",
    f"unet.{BLOCK}.attn2.processor.to_out_lora.down.weight": f"unet.{BLOCK}.attn2.to_out.0",
    f"unet.{BLOCK}.attn2.to_out.0.lora.down.weight": f"unet.{BLOCK}.attn2.to_out.0",
    f"unet.{BLOCK}.ff.net.0.proj.lora.down.weight": f"unet.{BLOCK}.ff.net.0.proj",
    f"{BLOCK}.attn1.processor.to_v_lora.down.weight": f"{BLOCK}.attn1.to_v",
    f"text_encoder.{TEXT}.self_attn.q_proj.lora_linear_layer.down.weight": f"text_encoder.{TEXT}.self_attn.q_proj",
    f"text_encoder.{TEXT}.self_attn.to_k_lora.down.weight": f"text_encoder.{TEXT}.self_attn.k_proj",
    f"text_encoder_2.{TEXT}.self_attn.to_out_lora.down.weight": f"text_encoder_2.{TEXT}.self_attn.out_proj",
    f"text_encoder.{TEXT}.mlp.fc1.lora_linear_layer.down.weight": f"text_encoder.{TEXT}.mlp.fc1",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "transformer.transformer_blocks.0.attn.to_q",
}


@pytest.mark.parametrize("key, module", SPELLINGS.items())
def test_every_spelling_means_the_module_of_today(tmp_path: Path, key: str, module: str) -> None:
    up = key.replace(".lora_A.", ".lora_B.").replace(".down.", ".up.")
    own = read(tmp_path, {key: A, up: B})
    assert_same_bits(applied(np.zeros((2, 3)), own.deltas[module]), PRODUCT)
    assert (len(own.deltas), own.origin.format, own.origin.method) == (1, "diffusers", "LoRA")


@pytest.mark.parametrize("key, module", SPELLINGS.items())
def test_diffusers_itself_takes_them_for_the_same_modules(key: str, module: str) -> None:
    utils = pytest.importorskip("diffusers.utils.state_dict_utils", reason="needs diffusers")
    part = key.partition(".")[0]
    if part.startswith("text_encoder"):
        # It tells the oldest spelling by `to_out_lora`.
        state = {key: 0} if "_lora." not in key else {key: 0, "x.to_out_lora.up": 1}
        name = next(iter(utils.convert_state_dict_to_peft(utils.convert_state_dict_to_diffusers(state))))
    else:
        (name,) = utils.convert_unet_state_dict_to_peft({key: 0})
    assert name == f"{module}.lora_A.weight"


def test_a_folder_that_holds_the_file_is_the_adapter(tmp_path: Path) -> None:
    read(tmp_path, pair("unet.proj"))
    assert read_adapter(tmp_path).name == tmp_path.name
    assert list(read_adapter(tmp_path).deltas) == ["unet.proj"]


def test_an_old_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    state = {f"{BLOCK}.attn1.processor.to_q_lora.{side}.weight": value for side, value in (("down", A), ("up", B))}
    torch.save({key: torch.tensor(value) for key, value in state.items()}, tmp_path / "pytorch_lora_weights.bin")
    assert list(read_adapter(tmp_path).deltas) == [f"{BLOCK}.attn1.to_q"]


@pytest.mark.parametrize(
    "module", ["base_model.model.model.layers.0.q", "model.layers.0.q", "transformer.h.0.attn.c_attn"]
)
def test_half_of_a_peft_folder_is_not_taken_for_diffusers(tmp_path: Path, module: str) -> None:
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        read(tmp_path, pair(module))


def test_a_convolution_keeps_its_kernel(tmp_path: Path) -> None:
    own = read(tmp_path, pair("unet.conv_in", numbers(2, 4, 3, 3), numbers(6, 2, 1, 1))).deltas["unet.conv_in"]
    assert (own.kind, own.a.shape, own.b.shape) == (Conv((3, 3)), (2, 4, 3, 3), (6, 2))


# --- scales ------------------------------------------------------------------------------------


def test_without_an_alpha_the_scale_is_1(tmp_path: Path) -> None:
    own = read(tmp_path, pair("unet.a.to_q") | pair("unet.b.to_q"))
    assert {name: entry.scale for name, entry in own.deltas.items()} == {"unet.a.to_q": 1.0, "unet.b.to_q": 1.0}


def test_an_alpha_beside_the_factors_counts(tmp_path: Path) -> None:
    tensors = pair("unet.a.to_q") | {"unet.a.to_q.alpha": np.array(6.0, "f4")}
    assert read(tmp_path, tensors).deltas["unet.a.to_q"].scale == 3.0


def test_the_config_of_the_header_says_the_scale(tmp_path: Path) -> None:
    wide = pair("unet.b.proj", numbers(4, 3), numbers(2, 4))
    more = {"rank_pattern": {"b.proj": 4}, "alpha_pattern": {"a.to_q": 5}, "lora_alpha": 8}
    own = read(tmp_path, pair("unet.a.to_q") | wide | pair("text_encoder.to_q"), config("unet", **more))
    # Of the text encoder the header says nothing.
    scales = {"unet.a.to_q": 2.5, "unet.b.proj": 2.0, "text_encoder.to_q": 1.0}
    assert {name: entry.scale for name, entry in own.deltas.items()} == scales


def test_the_config_of_the_header_may_be_rslora_or_dora(tmp_path: Path) -> None:
    own = read(tmp_path, pair("unet.a.to_q"), config("unet", use_rslora=True, lora_alpha=4))
    assert own.deltas["unet.a.to_q"].scale == 4 / 2**0.5
    tensors = pair("unet.a.to_q") | {"unet.a.to_q.lora_magnitude_vector": numbers(2)}
    own = read(tmp_path, tensors, config("unet", use_dora=True))
    assert_same_bits(np.asarray(own.deltas["unet.a.to_q"].magnitude), numbers(2))
    assert own.origin.method == "DoRA"


def test_a_magnitude_without_a_config_is_dora(tmp_path: Path) -> None:
    tensors = pair("unet.a.to_q") | {"unet.a.to_q.lora_magnitude_vector.weight": numbers(2)}
    assert_same_bits(np.asarray(read(tmp_path, tensors).deltas["unet.a.to_q"].magnitude), numbers(2))


@pytest.mark.parametrize(
    "tensors, metadata, words",
    [
        (pair("unet.a") | pair("unet.b", numbers(4, 3), numbers(2, 4)), None, "have ranks 2, 4 and no alpha"),
        (
            pair("unet.a") | pair("unet.b") | {"unet.a.alpha": np.array(1, "f4")},
            None,
            "unet.b: has no alpha, and other",
        ),
        (pair("unet.a") | {"unet.a.alpha": np.zeros((), "f4")}, None, "unet.a: alpha must be"),
        (pair("unet.a", b=numbers(2, 3)), None, "unet.a: the factors must be"),
        (pair("unet.a", a=A.astype("i4")), None, "must be floating point, and is int32"),
        ({"unet.a.lora_A.weight": A}, None, "unet.a: has no lora_B; get the whole file"),
        (pair("unet.a.to_q") | pair("unet.a.processor.to_q"), None, "there are two tensors for lora_A"),
        (pair("unet.to_q"), config("unet", r=3), "rank must be 3"),
        (pair("unet.other"), config("unet"), "target_modules"),
        (pair("unet.to_q"), config("unet", r="x"), "r must be a rank"),
        (pair("unet.to_q"), {METADATA: "["}, "lora_adapter_metadata must be JSON"),
        (pair("unet.to_q"), {METADATA: "[]"}, "lora_adapter_metadata must be a JSON object"),
    ],
)
def test_what_is_not_told_or_does_not_fit_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Array], metadata: dict[str, str] | None, words: str
) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read(tmp_path, tensors, metadata)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "tensors, metadata, words",
    [
        (
            pair("unet.a") | {"unet.a.to_k_custom_diffusion.weight": A},
            None,
            "to_k_custom_diffusion.weight: is no tensor",
        ),
        (pair("unet.a") | {"unet.a.lora_B.bias": numbers(2)}, None, "unet.a: a bias on lora_B"),
        (pair("unet.to_q"), config("unet", layer_replication=[[0, 1]]), "layer_replication"),
    ],
)
def test_what_is_known_and_not_applied_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Array], metadata: dict[str, str] | None, words: str
) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read(tmp_path, tensors, metadata)
    assert words in str(caught.value)


# --- writing -----------------------------------------------------------------------------------

DELTAS = {
    "unet.mid_block.attentions.0.proj_in": Delta(numbers(2, 32, 1, 1), numbers(32, 2), 0.5, Conv((1, 1))),
    f"unet.{BLOCK}.attn1.to_q": Delta(numbers(3, 32), numbers(32, 3), 0.25),
    f"unet.{BLOCK}.ff.net.2": Delta(numbers(2, 128), numbers(32, 2), 2.0),
}


def test_what_is_written_names_parts_and_says_their_configs(tmp_path: Path) -> None:
    deltas = DELTAS | {f"text_encoder.{TEXT}.self_attn.q_proj": delta(4, 6)}
    file = write_adapter(adapter(deltas), tmp_path / "x.safetensors", format="diffusers")
    assert set(safetensors.numpy.load_file(file)) == {f"{name}.lora_{side}.weight" for name in deltas for side in "AB"}
    with safetensors.safe_open(file, "np") as opened:
        metadata = json.loads(opened.metadata()[METADATA])
    assert metadata["unet.r"] == 2
    assert metadata["text_encoder.target_modules"] == [f"{TEXT}.self_attn.q_proj"]
    assert_same(read_adapter(file), adapter(deltas))


def assert_same(actual: Adapter, expected: Adapter) -> None:
    assert actual.deltas.keys() == expected.deltas.keys()
    for name, own in expected.deltas.items():
        found = actual.deltas[name]
        assert (found.scale, found.kind) == (own.scale, own.kind)
        assert_same_bits(found.a, own.a)
        assert_same_bits(found.b, own.b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_runs_what_is_written_with_the_same_outputs(tmp_path: Path, dora: bool) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()
    own = {
        name: replace(entry, magnitude=np.abs(numbers(32, seed=7)) + 1 if dora else None)
        for name, entry in DELTAS.items()
    }
    write_adapter(adapter(own), tmp_path / "own.safetensors", format="diffusers")
    arguments = (torch.randn(1, 4, 4, 4), 3, torch.randn(1, 2, 32))
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    with torch.no_grad():
        unet.load_lora_adapter(tmp_path, weight_name="own.safetensors", prefix="unet")
        theirs = unet(*arguments).sample.numpy()
        unet.unload_lora()
        for name, entry in read_adapter(tmp_path / "own.safetensors").deltas.items():
            weight = plain[f"{name.removeprefix('unet.')}.weight"]
            weight.copy_(torch.tensor(applied(weight.numpy(), entry)))
        unet.load_state_dict(plain)
        assert_close(unet(*arguments).sample.numpy(), theirs)


@pytest.mark.parametrize(
    "own, words",
    [
        (adapter({"unet.a": delta(4, 6)}, {"unet.b.weight": numbers(4)}), "unet.b.weight: is a whole weight"),
        (adapter({"model.a": delta(4, 6)}), "model.a: must be of a part of a pipeline"),
        (adapter({"unet.a": Delta(numbers(2, 9), numbers(4, 2), 1.0, EMBEDDING)}), "unet.a: is an embedding"),
        (
            adapter({"unet.a": replace(delta(4, 6), magnitude=numbers(6)), "unet.b": delta(4, 6)}),
            "has no DoRA, and a has",
        ),
    ],
)
def test_what_diffusers_files_cannot_hold_is_refused_by_name(tmp_path: Path, own: Adapter, words: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        write_adapter(own, tmp_path / "x.safetensors", format="diffusers")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())
