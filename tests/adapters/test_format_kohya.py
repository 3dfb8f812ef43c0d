"""Kohya's and LyCORIS' files: what every tensor means, by hand-computed numbers and by LyCORIS' own formulas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import read_adapter
from onnx_lora.adapters import Adapter, Delta, MatrixDelta, Replacement
from onnx_lora.adapters.formats.diffusion.sgm import from_sgm, to_sgm
from onnx_lora.adapters.write import write_adapter
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.kinds import EMBEDDING, LINEAR, Conv
from onnx_lora.points import Array
from tests.adapters.building import adapter, delta, numbers
from tests.adapters.merging import applied, changed, torch
from tests.support.numbers import assert_close, assert_same_bits

MODULE = "lora_unet_mid_block_attentions_0_proj_in"
NAME = "unet.mid_block_attentions_0_proj_in"
DOWN, UP = np.array([[1, 2, 3], [4, 5, 6]], "f4"), np.array([[1, 0], [0, 2]], "f4")
PRODUCT = np.array([[1, 2, 3], [8, 10, 12]])  # UP · DOWN
# LyCORIS adds it to the norms of DoRA.
EPS = np.finfo(np.float32).eps


def read(tmp_path: Path, tensors: Mapping[str, Array], *, module: str = MODULE) -> Adapter:
    file = tmp_path / "style.safetensors"
    file.write_bytes(safetensors.numpy.save({f"{module}.{name}": values for name, values in tensors.items()}))
    return read_adapter(file)


def factors(**more: Array) -> dict[str, Array]:
    return {"lora_down.weight": DOWN, "lora_up.weight": UP, **more}


def effect(own: Delta) -> Array:
    return applied(np.zeros((2, 3)), own)


# --- scales ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alpha, times",
    [
        (None, 1),  # missing: the rank
        (np.array(2.0, "f4"), 1),
        (np.array(1.0, "f2"), 0.5),
        (np.array([8.0], "f4"), 4),
        (np.array(-1.0, "f4"), -0.5),
        (np.array(4, "i8"), 2),
    ],
)
def test_the_scale_is_alpha_over_rank_and_1_without_alpha(tmp_path: Path, alpha: Array | None, times: float) -> None:
    own = read(tmp_path, factors() if alpha is None else factors(alpha=alpha))
    assert own.deltas[NAME].scale == times
    assert_same_bits(effect(own.deltas[NAME]), PRODUCT * float(times))
    assert (own.name, own.origin.format, own.origin.method, own.flat_names) == ("style", "kohya", "LoRA", True)


@pytest.mark.parametrize("alpha", [np.array(0.0, "f4"), np.array(np.nan, "f4"), np.ones(2, "f4"), np.array(True)])
def test_an_alpha_that_is_no_number_or_0_is_refused(tmp_path: Path, alpha: Array) -> None:
    with pytest.raises(AdapterFileError, match=rf"{NAME}: alpha must be"):
        read(tmp_path, factors(alpha=alpha))


def test_parts_of_a_pipeline_have_their_prefixes(tmp_path: Path) -> None:
    prefixes = {
        "lora_unet_a_b": "unet.a_b",
        "lora_te_a_b": "text_encoder.a_b",
        "lora_te1_a_b": "text_encoder.a_b",
        "lora_te2_a_b": "text_encoder_2.a_b",
        "lora_te3_a_b": "text_encoder_3.a_b",
        "lora_transformer_a_b": "transformer.a_b",
        "lycoris_a_b": "a_b",
    }
    for prefix, name in prefixes.items():
        assert list(read(tmp_path, factors(), module=prefix).deltas) == [name]


# --- LoRA and LoCon ----------------------------------------------------------------------------


def test_a_convolution_keeps_its_kernel(tmp_path: Path) -> None:
    down, up = numbers(2, 4, 3, 3), numbers(6, 2, 1, 1, seed=1)
    own = read(tmp_path, {"lora_down.weight": down, "lora_up.weight": up, "alpha": np.array(1, "f4")}).deltas[NAME]
    assert (own.kind, own.a.shape, own.b.shape, own.scale) == (Conv((3, 3)), (2, 4, 3, 3), (6, 2), 0.5)
    image = torch.randn(1, 4, 5, 5)
    expected = torch.conv2d(torch.conv2d(image, torch.tensor(down)), torch.tensor(up)) * 0.5
    weight = torch.tensor(applied(np.zeros((6, 4, 3, 3)), own), dtype=torch.float32)
    assert_close(torch.conv2d(image, weight).numpy(), expected.numpy())


def test_a_kernel_of_1_fits_linear_modules_too(tmp_path: Path) -> None:
    kernel = {"lora_down.weight": DOWN[..., None, None], "lora_up.weight": UP[..., None, None]}
    own = read(tmp_path, kernel).deltas[NAME]
    assert isinstance(own, MatrixDelta)
    assert_same_bits(effect(own), PRODUCT.astype("f8"))


def test_locons_core_is_a_kernel_between_the_factors(tmp_path: Path) -> None:
    down, core, up = numbers(2, 4, 1, 1), numbers(2, 2, 3, 3, seed=1), numbers(6, 2, 1, 1, seed=2)
    own = read(tmp_path, {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up}).deltas[NAME]
    image = torch.randn(1, 4, 5, 5)
    middle = torch.conv2d(torch.conv2d(image, torch.tensor(down)), torch.tensor(core))
    expected = torch.conv2d(middle, torch.tensor(up))
    weight = torch.tensor(applied(np.zeros((6, 4, 3, 3)), own), dtype=torch.float32)
    assert_close(torch.conv2d(image, weight).numpy(), expected.numpy())


def test_names_that_lost_their_dots_are_read_too(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {f"{MODULE}_lora_down.weight": DOWN, f"{MODULE}_lora_up.weight": UP}
    file.write_bytes(safetensors.numpy.save(tensors))
    assert_same_bits(effect(read_adapter(file).deltas[NAME]), PRODUCT.astype("f8"))


# --- DoRA --------------------------------------------------------------------------------------


def decomposed(weight: Array, dora_scale: Array) -> Array:
    """LyCORIS' `_weight_decompose`, at multiplier 1."""
    axes = tuple(axis for axis in range(weight.ndim) if dora_scale.shape[axis] == 1)
    return weight * dora_scale / (np.sqrt((weight**2).sum(axis=axes, keepdims=True)) + EPS)


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "convolution"])
def test_dora_by_outputs_is_a_magnitude(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    base, m = numbers(6, 4, *kernel, seed=5), np.abs(numbers(6, 1, *ones, seed=6))
    down, up = numbers(2, 4, *kernel), numbers(6, 2, *ones, seed=1)
    adapter = read(tmp_path, {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": m})
    total = base + (up.reshape(6, 2) @ down.reshape(2, -1)).reshape(base.shape)
    assert adapter.deltas[NAME].magnitude is not None
    assert adapter.origin.method == "DoRA"
    assert_close(applied(base, adapter.deltas[NAME]), decomposed(total, m))


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "convolution"])
def test_dora_by_inputs_folds(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    base, m = numbers(6, 4, *kernel, seed=5), np.abs(numbers(1, 4, *ones, seed=6))
    down, up = numbers(2, 4, *kernel), numbers(6, 2, *ones, seed=1)
    adapter = read(tmp_path, {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": m})
    total = base + (up.reshape(6, 2) @ down.reshape(2, -1)).reshape(base.shape)
    assert adapter.changes[NAME].method == "DoRA by inputs of LoRA"
    assert_close(changed(base, adapter.changes[NAME], Conv(kernel) if kernel else LINEAR), decomposed(total, m))
    assert "must fit" in str(adapter.changes[NAME].explain_misfit((6, 5, *kernel), Conv(kernel) if kernel else LINEAR))


# --- LyCORIS -----------------------------------------------------------------------------------


def hada(rank: int, outputs: int, inputs: int) -> dict[str, Array]:
    shapes = {"hada_w1_a": (outputs, rank), "hada_w1_b": (rank, inputs)}
    shapes |= {"hada_w2_a": (outputs, rank), "hada_w2_b": (rank, inputs)}
    return {name: numbers(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("dora", [None, (6, 1), (1, 4)], ids=["plain", "dora by outputs", "dora by inputs"])
def test_loha_is_a_product_of_products(tmp_path: Path, dora: tuple[int, int] | None) -> None:
    tensors, base = hada(2, 6, 4), numbers(6, 4, seed=9)
    more = {} if dora is None else {"dora_scale": np.abs(numbers(*dora, seed=8))}
    adapter = read(tmp_path, {**tensors, **more, "alpha": np.array(1, "f4")})
    first = tensors["hada_w1_a"] @ tensors["hada_w1_b"]
    total = base + first * (tensors["hada_w2_a"] @ tensors["hada_w2_b"]) * 0.5
    expected = total if dora is None else decomposed(total, more["dora_scale"])
    assert_close(changed(base, adapter.changes[NAME], LINEAR), expected)


def test_a_magnitude_of_another_size_is_named(tmp_path: Path) -> None:
    own = read(tmp_path, {**hada(2, 6, 4), "dora_scale": numbers(1, 5)}).changes[NAME]
    misfit = own.explain_misfit((6, 4), LINEAR)
    assert misfit == "dora_scale must have one value for each of the weight's 4 inputs, and has 5"


def test_loha_of_a_kernel_by_modes(tmp_path: Path) -> None:
    names = {"hada_t1": (2, 2, 3, 3), "hada_w1_a": (2, 6), "hada_w1_b": (2, 4)}
    names |= {"hada_t2": (2, 2, 3, 3), "hada_w2_a": (2, 6), "hada_w2_b": (2, 4)}
    tensors = {name: numbers(*shape, seed=index) for index, (name, shape) in enumerate(names.items())}
    base = numbers(6, 4, 3, 3, seed=9)
    # LyCORIS' `rebuild_tucker`.
    left, right = (
        np.einsum("ij...,jr,ip->pr...", *(tensors[f"hada_{part}"] for part in (f"t{n}", f"w{n}_b", f"w{n}_a")))
        for n in (1, 2)
    )
    own = read(tmp_path, tensors).changes[NAME]
    assert_close(changed(base, own, Conv(base.shape[2:])), base + left * right)


@pytest.mark.parametrize(
    "shapes, alpha, times",
    [
        ({"lokr_w1": (2, 2), "lokr_w2": (3, 2)}, None, 1),
        ({"lokr_w1": (2, 2), "lokr_w2": (3, 2)}, 7.0, 1),  # both whole: alpha does not count
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)}, 1.0, 0.5),
        ({"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)}, 6.0, 3),
    ],
)
def test_lokr_is_a_kronecker_product(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], alpha: float | None, times: float
) -> None:
    tensors = {name: numbers(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}
    base = numbers(6, 4, seed=9)
    own = read(tmp_path, tensors | ({} if alpha is None else {"alpha": np.array(alpha, "f4")})).changes[NAME]
    first, second = (
        tensors[f"lokr_w{n}"] if f"lokr_w{n}" in tensors else tensors[f"lokr_w{n}_a"] @ tensors[f"lokr_w{n}_b"]
        for n in (1, 2)
    )
    assert_close(changed(base, own, LINEAR), base + np.kron(first, second) * times)


def test_lokr_of_a_convolution(tmp_path: Path) -> None:
    tensors = {"lokr_w1": numbers(2, 2), "lokr_w2_a": numbers(3, 2, seed=1), "lokr_w2_b": numbers(2, 2 * 9, seed=2)}
    second = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).reshape(3, 2, 3, 3)
    base = numbers(6, 4, 3, 3, seed=9)
    expected = base + np.kron(tensors["lokr_w1"][..., None, None], second)
    assert_close(changed(base, read(tmp_path, tensors).changes[NAME], Conv(base.shape[2:])), expected)


def test_differences_are_added(tmp_path: Path) -> None:
    own = read(tmp_path, {"diff": numbers(6, 4), "diff_b": numbers(6, seed=1)})
    base = numbers(6, 4, seed=9)
    assert_close(changed(base, own.changes[NAME], LINEAR), base + numbers(6, 4))
    assert own.replacements[f"{NAME}.bias"] == Replacement(own.replacements[f"{NAME}.bias"].value, operation="add")
    assert "must have the weight's shape" in str(own.changes[NAME].explain_misfit((4, 6), LINEAR))


def test_norms_are_added(tmp_path: Path) -> None:
    own = read(tmp_path, {"w_norm": numbers(6), "b_norm": numbers(6, seed=1)})
    assert {name: entry.operation for name, entry in own.replacements.items()} == {
        f"{NAME}.weight": "add",
        f"{NAME}.bias": "add",
    }


@pytest.mark.parametrize(
    "tensor", ["oft_blocks", "oft_diag", "rescale", "on_input", "a1.weight", "bm.weight", "set_weight", "scalar"]
)
def test_methods_that_are_not_applied_are_refused_by_name(tmp_path: Path, tensor: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=rf"{NAME}, {tensor}: .* is not applied"):
        read(tmp_path, factors(**{tensor: numbers(2, 2)}))


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"lora_down.weight": DOWN}, "has no lora_up.weight; get the whole file"),
        ({"lora_down.weight": DOWN, "lora_up.weight": UP[:, :1]}, "of one rank"),
        ({"lora_down.weight": DOWN, "lora_up.weight": numbers(2, 2, 3, 3)}, "of one rank"),
        ({"lora_down.weight": DOWN.astype("i4"), "lora_up.weight": UP}, "must be floating point, and is int32"),
        (factors(**{"lora_mid.weight": numbers(2, 3, 3, 3)}), "must have a kernel, and fit"),
        (factors(**{"lora_mid.weight": numbers(2, 2)}), "must have a kernel, and fit"),
        (factors(dora_scale=numbers(2, 3)), "dora_scale must have shape"),
        (factors(diff=numbers(2, 3)), "has both diff and factors"),
        (factors(hada_w1_a=numbers(2, 2)), "none of a method known here"),
        (factors(new_tensor=numbers(2, 2)), "none of a method known here"),
        ({"alpha": np.array(1, "f4")}, "none of a method known here"),
        ({"hada_w1_a": numbers(6, 2), "hada_w1_b": numbers(2, 4)}, "has no hada_w2_a and no hada_w2_b"),
        (hada(2, 6, 4) | {"hada_w2_b": numbers(2, 5)}, "must have one shape"),
        (hada(2, 6, 4) | {"hada_w2_b": numbers(3, 4)}, "of hada_w2 must have one rank"),
        (hada(2, 6, 4) | {"hada_t1": numbers(3, 3, 3, 3)}, "must fit the factors"),
        (hada(2, 6, 4) | {"hada_w1_a": np.full((6, 2), np.nan, "f4")}, "12 of 12 values are NaN"),
        ({"lokr_w1": numbers(2, 2), "lokr_w1_a": numbers(2, 2), "lokr_w2": numbers(2, 2)}, "must be whole"),
        ({"lokr_w1": numbers(2), "lokr_w2": numbers(2, 2)}, "must be whole"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, tensors: dict[str, Array], words: str) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read(tmp_path, tensors)
    assert words in str(caught.value)
    assert NAME in str(caught.value)


def test_names_without_a_known_prefix_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {f"{MODULE}.lora_down.weight": DOWN, f"{MODULE}.lora_up.weight": UP, "emb_params": numbers(2)}
    file.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(AdapterFileError, match=r"emb_params: must begin with lora_unet_"):
        read_adapter(file)


# --- Stability's names -------------------------------------------------------------------------

SGM = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks_0_attn1_to_q",
    "input_blocks_5_1_proj_in": "down_blocks.1.attentions.1.proj_in",
    "input_blocks_8_0_skip_connection": "down_blocks.2.resnets.1.conv_shortcut",
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_9_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks_9_ff_net_0_proj",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_1_proj_out": "up_blocks.0.attentions.0.proj_out",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_8_0_in_layers_0": "up_blocks.2.resnets.2.norm1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}


@pytest.mark.parametrize("theirs, ours", SGM.items())
def test_stabilitys_names_are_diffusers_names_and_back(theirs: str, ours: str) -> None:
    assert from_sgm(theirs) == ours
    assert to_sgm(ours) == theirs


def test_an_upsampler_behind_no_attention_is_the_same_module() -> None:
    assert from_sgm("output_blocks_2_1_conv") == from_sgm("output_blocks_2_2_conv")


def test_other_names_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("down_blocks_0_attentions_0_proj_in", "input_blocks_1_1", "input_blocks_99_1_proj_in", "out_7"):
        assert from_sgm(name) is None
        assert list(read(tmp_path, factors(), module=f"lora_unet_{name}").deltas) == [f"unet.{name}"]
    assert to_sgm("encoder.layers.0") is None


def test_diffusers_maps_stabilitys_names_alike() -> None:
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils", reason="needs diffusers")

    class Config:
        layers_per_block = 2

    attention = "transformer_blocks_0_attn1_to_q.lora_down.weight"
    places = [f"input_blocks_{index}_1" for index in (4, 5, 7, 8)] + ["middle_block_1"]
    places += [f"output_blocks_{index}_1" for index in range(6)]
    for place in places:
        key = f"lora_unet_{place}_{attention}"
        (theirs,) = conversion._maybe_map_sgm_blocks_to_diffusers({key: 0}, Config())
        theirs = theirs.replace("input_blocks", "down_blocks").replace("output_blocks", "up_blocks")
        theirs = theirs.replace("middle_block", "mid_block").removeprefix("lora_unet_").partition(".")[0]
        ours = from_sgm(f"{place}_transformer_blocks_0_attn1_to_q")
        assert ours is not None
        assert ours.replace(".", "_") == theirs


# --- writing -----------------------------------------------------------------------------------


def keys(file: Path) -> set[str]:
    return set(safetensors.numpy.load_file(file))


def test_what_is_written_has_kohyas_names_and_the_same_effect(tmp_path: Path) -> None:
    deltas: dict[str, Delta] = {
        "unet.down_blocks.0.attentions.0.proj_in": Delta(numbers(2, 4), numbers(6, 2), 0.25),
        "unet.conv_in": Delta(numbers(2, 4, 3, 3), numbers(6, 2), 3.0, Conv((3, 3))),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": delta(4, 6),
        "model.layers.0.q": Delta(numbers(2, 4), numbers(6, 2), 1.0, magnitude=numbers(6)),
    }
    file = write_adapter(adapter(deltas), tmp_path / "x.safetensors", format="kohya")
    flat = {
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_conv_in",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lycoris_model_layers_0_q",
    }
    tensors = ("alpha", "lora_down.weight", "lora_up.weight")
    assert keys(file) == {f"{name}.{own}" for name in flat for own in tensors} | {"lycoris_model_layers_0_q.dora_scale"}
    stored = safetensors.numpy.load_file(file)
    assert stored["lora_unet_conv_in.alpha"] == 6
    assert stored["lora_unet_conv_in.lora_up.weight"].shape == (6, 2, 1, 1)
    again = read_adapter(file).deltas
    for name, own in deltas.items():
        other = again[name if name in again else _flat(name)]
        shape = (6, *own.a.shape[1:])
        assert_close(applied(np.ones(shape), other), applied(np.ones(shape), own))


def _flat(name: str) -> str:
    """As the reader gives names: flat behind the part."""
    part, _, rest = name.partition(".")
    parts = ("unet", "text_encoder")
    return f"{part}.{rest.replace('.', '_')}" if part in parts else name.replace(".", "_")


def test_sdxl_gets_stabilitys_names_and_numbered_text_encoders(tmp_path: Path) -> None:
    names = {
        "unet.down_blocks.1.attentions.0.proj_in": "lora_unet_input_blocks_4_1_proj_in",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    }
    file = write_adapter(adapter({name: delta(4, 6) for name in names}), tmp_path / "x.safetensors", format="kohya")
    assert {key.partition(".")[0] for key in keys(file)} == set(names.values())


def test_differences_of_norms_and_biases_are_written(tmp_path: Path) -> None:
    whole: Mapping[str, Replacement] = {
        "unet.norm.weight": Replacement(numbers(4), operation="add"),
        "unet.norm.bias": Replacement(numbers(4), operation="add"),
        "unet.lin.bias": Replacement(numbers(4), operation="add"),
    }
    file = write_adapter(adapter({}, whole), tmp_path / "x.safetensors", format="kohya")
    assert keys(file) == {"lora_unet_norm.w_norm", "lora_unet_norm.b_norm", "lora_unet_lin.diff_b"}
    assert set(read_adapter(file).replacements) == set(whole)


@pytest.mark.parametrize(
    "own, words",
    [
        (adapter({}, {"unet.norm.weight": numbers(4)}), "unet.norm.weight: is a whole weight"),
        (adapter({"unet.e": Delta(numbers(2, 9), numbers(4, 2), 1.0, EMBEDDING)}), "unet.e: is an embedding"),
        (adapter({"unet.a.b": delta(4, 6), "unet.a_b": delta(4, 6)}), "has the flat name lora_unet_a_b"),
    ],
)
def test_what_kohyas_files_cannot_hold_is_refused_by_name(tmp_path: Path, own: Adapter, words: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        write_adapter(own, tmp_path / "x.safetensors", format="kohya")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_diffusers_reads_what_is_written(tmp_path: Path) -> None:
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils", reason="needs diffusers")
    names = [
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ]
    own: dict[str, Any] = {name: Delta(numbers(2, 4), numbers(6, 2), 0.25) for name in names}
    file = write_adapter(adapter(own), tmp_path / "x.safetensors", format="kohya")
    state = {key: torch.tensor(values) for key, values in safetensors.numpy.load_file(file).items()}
    made, alphas = conversion._convert_non_diffusers_lora_to_diffusers(state)
    assert {key.partition(".lora")[0].partition("_lora")[0].replace(".processor", "") for key in made} == {
        names[0],
        names[1].removesuffix("_linear_layer"),
    }
    assert set(alphas.values()) == {0.5}
