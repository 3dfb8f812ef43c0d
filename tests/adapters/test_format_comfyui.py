"""Files with dotted names of ComfyUI, DiffSynth and XLabs: what every tensor means, and what tells them from others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import Package, bind, read_adapter
from onnx_lora.adapters import Adapter
from onnx_lora.errors import AdapterFileError, BindError, UnsupportedAdapterError
from onnx_lora.points import Array
from tests.adapters.building import PackageBuilder, numbers
from tests.support.numbers import assert_same_bits

A, B = numbers(2, 4, seed=1), numbers(6, 2, seed=2)
BLOCK = "transformer_blocks.0.attn.to_q"


def read(tmp_path: Path, tensors: Mapping[str, Array]) -> Adapter:
    file = tmp_path / "style.safetensors"
    file.write_bytes(safetensors.numpy.save(dict(tensors)))
    return read_adapter(file)


def alpha(value: float) -> Array:
    return np.array(value, "f4")


@pytest.mark.parametrize(
    "tensors, module, scale",
    [
        ({"diffusion_model.x.0.q.lora_A.weight": A, "diffusion_model.x.0.q.lora_B.weight": B}, "x.0.q", 1.0),
        (
            {
                "diffusion_model.x.0.q.lora_down.weight": A,
                "diffusion_model.x.0.q.lora_up.weight": B,
                "diffusion_model.x.0.q.alpha": alpha(1),
            },
            "x.0.q",
            0.5,
        ),
        (
            {f"transformer.{BLOCK}.lora_down.weight": A, f"transformer.{BLOCK}.lora_up.weight": B}
            | {f"transformer.{BLOCK}.alpha": alpha(8)},
            f"transformer.{BLOCK}",
            4.0,
        ),
        (
            {f"transformer.{BLOCK}.lora_A.default.weight": A, f"transformer.{BLOCK}.lora_B.default.weight": B},
            f"transformer.{BLOCK}",
            1.0,
        ),
        ({f"{BLOCK}.lora_A.weight": A, f"{BLOCK}.lora_B.weight": B}, BLOCK, 1.0),
        ({"x.0.q.lora_down.weight": A, "x.0.q.lora_up.weight": B}, "x.0.q", 1.0),
    ],
    ids=["ComfyUI", "ComfyUI with alpha", "a part with alpha", "DiffSynth", "no prefix", "no prefix, kohya's tensors"],
)
def test_each_spelling_is_the_same_pair(
    tmp_path: Path, tensors: Mapping[str, Array], module: str, scale: float
) -> None:
    adapter = read(tmp_path, tensors)
    ((name, delta),) = adapter.deltas.items()
    assert (name, delta.scale, adapter.origin.format) == (module, scale, "comfyui")
    assert_same_bits(delta.a, A)
    assert_same_bits(delta.b, B)


def test_a_package_says_which_network_is_meant(tmp_path: Path) -> None:
    package = _pipeline(tmp_path / "p")
    adapter = read(
        tmp_path, {"diffusion_model.blocks.0.q.lora_A.weight": A, "diffusion_model.blocks.0.q.lora_B.weight": B}
    )
    assert bind(adapter, package).coverage.applied == ("blocks.0.q",)


def _pipeline(folder: Path) -> Package:
    return PackageBuilder(folder).point("blocks.0.q", 4, 6).point("text.q", 4, 6).open()


def test_names_of_a_models_own_code_are_called_so(tmp_path: Path) -> None:
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    adapter = read(tmp_path, {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B})
    with pytest.raises(BindError, match="the names of its model's own code, and the package those of diffusers"):
        bind(adapter, _pipeline(tmp_path / "p"))
    # A package that was made of that code has these names.
    own = PackageBuilder(tmp_path / "own").point("double_blocks.0.img_attn.qkv", 4, 6).open()
    assert bind(adapter, own).coverage.applied == ("double_blocks.0.img_attn.qkv",)


def _xlabs() -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for seed, (name, outputs) in enumerate(
        {
            "double_blocks.0.processor.qkv_lora1": 18,
            "double_blocks.0.processor.qkv_lora2": 18,
            "double_blocks.0.processor.proj_lora1": 6,
            "double_blocks.0.processor.proj_lora2": 6,
            "single_blocks.3.processor.qkv_lora": 18,
            "single_blocks.3.processor.proj_lora": 6,
        }.items()
    ):
        tensors[f"{name}.down.weight"] = numbers(2, 4, seed=seed)
        tensors[f"{name}.up.weight"] = numbers(outputs, 2, seed=seed + 50)
    return tensors


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_factors_are_what_diffusers_makes_of_them(tmp_path: Path, prefix: str) -> None:
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    torch = pytest.importorskip("torch")
    tensors = {f"{prefix}{name}": values for name, values in _xlabs().items()}
    theirs = conversion._convert_xlabs_flux_lora_to_diffusers(
        {name: torch.from_numpy(values) for name, values in tensors.items()}
    )
    adapter = read(tmp_path, tensors)
    assert len(adapter.deltas) * 2 == len(theirs)
    for module, delta in adapter.deltas.items():
        assert delta.scale == 1.0
        assert_same_bits(delta.a, theirs[f"transformer.{module}.lora_A.weight"].numpy())
        assert_same_bits(np.ascontiguousarray(delta.b), theirs[f"transformer.{module}.lora_B.weight"].numpy())


def test_what_kohyas_files_hold_is_read_behind_dotted_names_too(tmp_path: Path) -> None:
    kohya, dotted = {}, {}
    tensors = {"lora_down.weight": A, "lora_up.weight": B, "dora_scale": numbers(6, 1, seed=4), "diff_b": numbers(6)}
    for name, values in tensors.items():
        kohya[f"lora_unet_q.{name}"] = values
        dotted[f"diffusion_model.q.{name}"] = values
    (expected,) = read(tmp_path, kohya).deltas.values()
    adapter = read(tmp_path, dotted)
    (actual,) = adapter.deltas.values()
    assert_same_bits(actual.magnitude, expected.magnitude)
    assert list(adapter.replacements) == ["q.bias"]


@pytest.mark.parametrize(
    "more, error, message",
    [
        (
            {"bundle_emb.tok.string_to_param.*": numbers(2, 4)},
            UnsupportedAdapterError,
            "a trained token, which",
        ),
        ({"diffusion_model.y.lora_Q.weight": A}, UnsupportedAdapterError, "is no tensor of LoRA known here; upgrade"),
        ({"diffusion_model.y.lora_A.weight": A}, AdapterFileError, "y: has no lora_up.weight"),
        ({"diffusion_model.x.lora_down.weight": A}, AdapterFileError, "two tensors for lora_down.weight of x"),
        ({"double_blocks.0.processor.other_lora.down.weight": A}, UnsupportedAdapterError, "no tensor of LoRA known"),
        (
            {"diffusion_model.y.lora_A.weight": numbers(3, 4), "diffusion_model.y.lora_B.weight": numbers(6, 3)},
            AdapterFileError,
            "the modules have ranks 2, 3 and no alpha",
        ),
        (
            {
                "diffusion_model.y.lora_A.weight": A,
                "diffusion_model.y.lora_B.weight": B,
                "diffusion_model.y.alpha": np.array(2.0, "f4"),
            },
            AdapterFileError,
            r"x \(and 0 more\): has no alpha, and other modules have one",
        ),
        ({"double_blocks.0.processor.qkv_lora1.up.weight": numbers(7, 2)}, AdapterFileError, "outputs of 3 modules"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(
    tmp_path: Path, more: Mapping[str, Array], error: type[Exception], message: str
) -> None:
    whole = {"diffusion_model.x.lora_A.weight": A, "diffusion_model.x.lora_B.weight": B}
    with pytest.raises(error, match=message):
        read(tmp_path, whole | dict(more))


def test_onetrainers_tokens_beside_kohyas_names_are_called_so(tmp_path: Path) -> None:
    tensors = {"lora_te1_q.lora_down.weight": A, "lora_te1_q.lora_up.weight": B}
    with pytest.raises(UnsupportedAdapterError, match="is a trained token that OneTrainer put in"):
        read(tmp_path, tensors | {"bundle_emb.tok.string_to_param.*": numbers(2, 4)})


@pytest.mark.parametrize(
    "key", ["base_model.model.transformer_blocks.0.q.lora_A.weight", "model.layers.0.q.lora_A.weight"]
)
def test_half_of_a_peft_folder_is_not_taken(tmp_path: Path, key: str) -> None:
    with pytest.raises(AdapterFileError, match=r"give the folder|give that folder"):
        read(tmp_path, {key: A, key.replace("lora_A", "lora_B"): B})
