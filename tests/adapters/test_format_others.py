"""Three small formats: loralib's merged projections, cloneofsimo's numbered modules, and Olive's `.onnx_adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import bind, read_adapter
from onnx_lora.adapters import Adapter
from onnx_lora.adapters.methods.lora_layers.merged_linear import join_groups
from onnx_lora.adapters.problems import TensorError
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.points import Array
from tests.adapters.building import PackageBuilder, numbers
from tests.adapters.merging import applied, torch
from tests.support.numbers import assert_close, assert_same_bits

# --- loralib's MergedLinear --------------------------------------------------------------------


def loralib_delta(a: Array, b: Array, enable: list[bool]) -> Array:
    """loralib 0.1.2: `MergedLinear.merge_AB` with its `zero_pad`."""
    product = torch.nn.functional.conv1d(
        torch.tensor(a).unsqueeze(0), torch.tensor(b).unsqueeze(-1), groups=sum(enable)
    ).squeeze(0)
    outputs = len(b) // sum(enable) * len(enable)
    index = torch.zeros(outputs, dtype=torch.bool).view(len(enable), -1)
    index[torch.tensor(enable), :] = True
    result = torch.zeros(outputs, a.shape[1])
    result[index.view(-1)] = product
    return np.asarray(result)


def peft_delta(a: Array, b: Array, enable: list[bool]) -> Array:
    """PEFT 0.2: `MergedLinear.forward` without its base, on the unit vectors; always two groups."""
    x = torch.eye(a.shape[1])[None]
    after_a = x @ torch.tensor(a).T
    after_b = torch.nn.functional.conv1d(after_a.transpose(-2, -1), torch.tensor(b), groups=2).transpose(-2, -1)
    outputs = len(b) // sum(enable) * len(enable)
    index = torch.zeros(outputs, dtype=torch.bool).view(len(enable), -1)
    index[torch.tensor(enable), :] = True
    result = torch.zeros(*after_b.shape[:-1], outputs).view(-1, outputs)
    result[:, index.view(-1)] = after_b.reshape(-1, len(b))
    return np.asarray(result).T


@pytest.mark.parametrize("enable", [[True, False, True], [True, True, True], [False, True], [True]])
def test_merged_projections_are_blocks_of_a_diagonal(enable: list[bool]) -> None:
    count = sum(enable)
    a, b = numbers(2 * count, 5), numbers(4 * count, 2, seed=1)
    own = join_groups(a, b, enable, 0.5)
    assert_close(applied(np.zeros((4 * len(enable), 5)), own), loralib_delta(a, b, enable) * 0.5)


@pytest.mark.parametrize("enable", [[True, False, True], [True, True, True]])
def test_pefts_merged_projections_have_two_groups(enable: list[bool]) -> None:
    count = sum(enable)
    a, b = numbers(4 * count, 5), numbers(4 * count, 2 * count, 1, seed=1)
    own = join_groups(a, b, enable, 1.0)
    assert_close(applied(np.zeros((4 * len(enable), 5)), own), peft_delta(a, b, enable))


@pytest.mark.parametrize(
    "a, b, enable",
    [
        (numbers(4, 5), numbers(8, 2), [False, False]),
        (numbers(4, 5, 1), numbers(8, 2), [True, True]),
        (numbers(4, 5), numbers(8, 2, 3), [True, True]),
        (numbers(5, 5), numbers(8, 2), [True, True]),
        (numbers(4, 5), numbers(7, 2), [True, True]),
        (numbers(10, 5), numbers(10, 2), [True, True]),
        (numbers(4, 5), numbers(8), [True, True]),
        (numbers(0, 5), numbers(0, 2), [True, True]),
    ],
)
def test_factors_that_are_no_merged_projections_are_named(a: Array, b: Array, enable: list[bool]) -> None:
    with pytest.raises(TensorError, match="the factors of MergedLinear must"):
        join_groups(a, b, enable, 1.0)


# --- cloneofsimo -------------------------------------------------------------------------------

WIDTHS = [1, 1, 2, 2, 4, 4, 4, 4, 4, 2, 2, 2, 1, 1, 1, 4]
TEXT = 3


def sizes() -> list[tuple[int, int]]:
    """Inputs and outputs of the UNet's modules by number, as the published files have them, in a small width."""
    found = []
    for width in (8 * times for times in WIDTHS):
        square = (width, width)
        found += [*[square] * 4, (width, 8 * width), square, (TEXT, width), (TEXT, width), square]
    return found


def numbered(path: Path, extra: Mapping[str, Array] = {}, *, change: int | None = None, text: int = 48) -> Adapter:
    tensors: dict[str, Array] = dict(extra)
    for index, (inputs, outputs) in enumerate(sizes()):
        tensors[f"unet:{index}:down"] = numbers(1, inputs + (index == change), seed=index)
        tensors[f"unet:{index}:up"] = numbers(outputs, 1, seed=index + 500)
    for index in range(text):
        tensors[f"text_encoder:{index}:down"] = numbers(1, 6, seed=index)
        tensors[f"text_encoder:{index}:up"] = numbers(6, 1, seed=index + 500)
    path.write_bytes(safetensors.numpy.save(tensors, {name: "<embed>" for name in extra if name.startswith("<")}))
    return read_adapter(path)


def test_numbers_are_the_modules_of_stable_diffusion(tmp_path: Path) -> None:
    own = numbered(tmp_path / "x.safetensors")
    places = {
        0: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        4: "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        6: "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        17: "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
        54: "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        143: "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    }
    for index, module in places.items():
        assert_same_bits(own.deltas[f"unet.{module}"].a, numbers(1, sizes()[index][0], seed=index))
    assert_same_bits(own.deltas["text_encoder.text_model.encoder.layers.11.self_attn.q_proj"].a, numbers(1, 6, seed=46))
    assert (len(own.deltas), own.origin.format) == (192, "cloneofsimo")
    assert {entry.scale for entry in own.deltas.values()} == {1.0}


@pytest.mark.parametrize("change, text", [(0, 48), (135, 48), (None, 47), (None, 20)])
def test_numbers_of_another_model_are_refused(tmp_path: Path, change: int | None, text: int) -> None:
    with pytest.raises(UnsupportedAdapterError, match="numbered modules of a model that is not known here"):
        numbered(tmp_path / "x.safetensors", change=change, text=text)


def test_trained_tokens_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match="<s1>: is the embedding of a token"):
        numbered(tmp_path / "x.safetensors", {"<s1>": numbers(6)})


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"unet:x:up": numbers(2, 2)}, "unet:x:up: must look like unet:0:up"),
        ({"unet:3:up": numbers(8, 2)}, "unet:3: the factors must be"),
        ({"unet:3:up": np.ones((8, 1), "i4")}, "unet:3:up: must be floating point"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, extra: dict[str, Array], words: str) -> None:
    path = tmp_path / "x.safetensors"
    numbered(path)
    tensors = safetensors.numpy.load_file(path) | dict(extra)
    path.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(path)
    assert words in str(caught.value)


# --- Olive -------------------------------------------------------------------------------------


def onnx_adapter(path: Path, tensors: Mapping[str, Array]) -> Path:
    onnxruntime = pytest.importorskip("onnxruntime")
    made = onnxruntime.AdapterFormat()
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(own) for name, own in tensors.items()})
    made.export_adapter(str(path))
    return path


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_olives_factors_are_ours_without_rows(tmp_path: Path, prefix: str) -> None:
    """`convert-adapters`: transposed, alpha / r in B, `base_model.model.` in front of some models' names."""
    a, b = numbers(2, 4), numbers(6, 2, seed=1)
    tensors = {f"{prefix}model.q.lora_A.weight": np.ascontiguousarray(a.T)}
    tensors |= {f"{prefix}model.q.lora_B.weight": np.ascontiguousarray(b.T) * np.float32(4)}
    own = read_adapter(onnx_adapter(tmp_path / "x.onnx_adapter", tensors))
    package = PackageBuilder(tmp_path / "package").point("model.q", 4, 6).open()
    bound = bind(own, package).tensors
    assert_close(bound["model.q.lora_A.weight"][0] @ bound["model.q.lora_B.weight"][0], a.T @ b.T * 4)


@pytest.mark.parametrize(
    "names, words",
    [
        (["q.lora_A.quant.weight", "q.lora_A.quant.scale"], "Olive quantized to 4 bits"),
        (["base_model.model.q.lora_A.weight", "q.lora_A.weight"], "with and without PEFT's prefix"),
    ],
)
def test_what_olive_quantized_or_named_twice_is_refused(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=words):
        read_adapter(onnx_adapter(tmp_path / "x.onnx_adapter", {name: numbers(4, 2) for name in names}))
