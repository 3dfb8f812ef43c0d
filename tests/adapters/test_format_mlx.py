"""MLX's folders: transposed factors, a scale that is used as it is, and what older versions meant by theirs."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import read_adapter
from onnx_lora.adapters import Adapter, Delta
from onnx_lora.adapters.write import write_adapter
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.kinds import EMBEDDING, LINEAR, Conv
from onnx_lora.points import Array
from tests.adapters.building import adapter, delta, numbers
from tests.adapters.merging import applied
from tests.support.numbers import assert_close, assert_same_bits

MODULE = "model.layers.3.self_attn.q_proj"
# x · A · B, MLX's way round.
A, B = np.array([[1, 4], [2, 5], [3, 6]], "f4"), np.array([[1, 0], [0, 2]], "f4")
PRODUCT = np.array([[1, 2, 3], [8, 10, 12]], "f8")


def folder(path: Path, tensors: Mapping[str, Array] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    fields = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 20.0}, **config}
    (path / "adapter_config.json").write_text(json.dumps({key: own for key, own in fields.items() if own is not None}))
    own = pair() if tensors is None else tensors
    (path / "adapters.safetensors").write_bytes(
        safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in own.items()})
    )
    return path


def pair(module: str = MODULE, **more: Array) -> dict[str, Array]:
    return {f"{module}.lora_a": A, f"{module}.lora_b": B, **{f"{module}.{name}": own for name, own in more.items()}}


def test_factors_are_transposed_and_the_scale_is_used_as_it_is(tmp_path: Path) -> None:
    own = read_adapter(folder(tmp_path, model="tiny"))
    assert own.deltas[MODULE].scale == 20.0
    assert_same_bits(applied(np.zeros((2, 3)), own.deltas[MODULE]), PRODUCT * 20)
    assert (own.origin.format, own.origin.method, own.origin.base_model) == ("mlx", "LoRA", "tiny")


@pytest.mark.parametrize(
    "parameters, more, scale",
    [
        ({"scale": 10.0}, {}, 10.0),
        ({"scale": 10.0, "alpha": 16}, {}, 10.0),  # with fine_tune_type: mlx-lm 0.19 and newer, which ignores alpha
        ({"scale": 10.0, "alpha": 16}, {"fine_tune_type": None}, 80.0),  # without use_dora: 0.13.0 and older
        ({"scale": 10.0, "alpha": 2}, {"fine_tune_type": None, "use_dora": False}, 10.0),  # the same either way
    ],
)
def test_the_scale_of_every_version(
    tmp_path: Path, parameters: dict[str, Any], more: dict[str, Any], scale: float
) -> None:
    own = read_adapter(folder(tmp_path, lora_parameters={"rank": 2, **parameters}, **more))
    assert own.deltas[MODULE].scale == scale


def test_an_alpha_of_which_versions_differ_is_refused_with_both_cures(tmp_path: Path) -> None:
    parameters = {"rank": 2, "scale": 10.0, "alpha": 16}
    with pytest.raises(UnsupportedAdapterError, match=r"take alpha out if it was 0\.15 or newer.* set scale to 80"):
        read_adapter(folder(tmp_path, lora_parameters=parameters, fine_tune_type=None, use_dora=False))


def test_dora_is_a_magnitude(tmp_path: Path) -> None:
    m, base = np.array([2, 3], "f4"), numbers(2, 3)
    parameters = {"rank": 2, "scale": 0.5}
    own = read_adapter(folder(tmp_path, pair(m=m), fine_tune_type="dora", lora_parameters=parameters)).deltas[MODULE]
    total = base + PRODUCT * 0.5
    assert_close(applied(base, own), m[:, None] * total / np.linalg.norm(total, axis=1, keepdims=True))
    # MLX has one for each row of an embedding; a delta of this kind is refused there.
    assert own.kind == LINEAR


def test_full_fine_tuning_is_whole_weights(tmp_path: Path) -> None:
    tensors = {"model.layers.3.mlp.up_proj.weight": numbers(6, 4), "model.norm.weight": numbers(4)}
    own = read_adapter(folder(tmp_path, tensors, fine_tune_type="full", lora_parameters=None))
    assert set(own.replacements) == set(tensors)
    assert all(entry.operation == "set" for entry in own.replacements.values())


def npz(path: Path, arrays: Mapping[str, Array], *, packed: bool = False) -> None:
    (np.savez_compressed if packed else np.savez)(path, **arrays)


def test_an_old_npz_is_read_with_a_config_and_refused_without(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "adapters.safetensors").unlink()
    npz(tmp_path / "adapters.npz", pair())
    assert_same_bits(applied(np.zeros((2, 3)), read_adapter(tmp_path).deltas[MODULE]), PRODUCT * 20)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UnsupportedAdapterError, match="without it the scale is unknown"):
        read_adapter(tmp_path)


def entry(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "content, words",
    [
        (entry(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n", b"1234"), "does not fit"),
        (entry(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", b"12345678"), "object"),
        (entry(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n"), "not known here"),
        (entry(b"[]"), "damaged"),
        (b"nothing", "damaged"),
    ],
)
def test_a_hostile_npz_is_refused_before_memory_is_taken(tmp_path: Path, content: bytes, words: str) -> None:
    folder(tmp_path)
    (tmp_path / "adapters.safetensors").unlink()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.lora_a.npy", content)
    (tmp_path / "adapters.npz").write_bytes(buffer.getvalue())
    with pytest.raises(AdapterFileError, match=words):
        read_adapter(tmp_path)


def test_a_compressed_npz_is_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "adapters.safetensors").unlink()
    npz(tmp_path / "adapters.npz", {"a": np.zeros(10**6, "f4")}, packed=True)
    with pytest.raises(AdapterFileError, match="must hold arrays that are not compressed"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "tensors, config, words",
    [
        ({f"{MODULE}.lora_a": A}, {}, "must have lora_a, lora_b by adapter_config.json, and has lora_a"),
        (pair(m=numbers(2)), {}, "must have lora_a, lora_b by adapter_config.json, and has lora_a, lora_b, m"),
        (pair(), {"fine_tune_type": "dora"}, "must have lora_a, lora_b, m"),
        (pair(), {"lora_parameters": {"rank": 3, "scale": 1.0}}, "must be [in, 3] and [3, out]"),
        (pair(), {"lora_parameters": {"rank": 0, "scale": 1.0}}, "must have a rank of at least 1"),
        (pair(), {"lora_parameters": {"rank": 2}}, "must have a rank of at least 1 and a scale"),
        (pair(), {"lora_parameters": {"rank": 2, "scale": float("nan")}}, "and a scale"),
        (pair(), {"lora_parameters": 3}, "must hold lora_parameters"),
        (pair(), {"lora_parameters": {"rank": 2, "scale": 1.0, "alpha": "x"}, "fine_tune_type": None}, "alpha of"),
        ({f"{MODULE}.weight": A}, {}, "must end with .lora_a, .lora_b or .m"),
        ({f"{MODULE}.lora_a": A.astype("i4"), f"{MODULE}.lora_b": B}, {}, "must be floating point, and is int32"),
        ({}, {}, "holds no tensor of an adapter"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, Array], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(folder(tmp_path, tensors, **config))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "tensors, config, words",
    [
        ({f"{MODULE}.lora_a": numbers(4, 2, 3), f"{MODULE}.lora_b": numbers(4, 3, 2)}, {}, "for each expert"),
        ({"q.scales": numbers(2, 2)}, {"fine_tune_type": "full"}, "q.scales: is no whole parameter"),
        ({"c.weight": numbers(2, 2, 2)}, {"fine_tune_type": "full"}, "c.weight: is a kernel"),
        (pair(), {"fine_tune_type": "new"}, "fine_tune_type 'new' is not known"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Array], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_adapter(folder(tmp_path, tensors, **config))
    assert words in str(caught.value)


def test_a_file_without_its_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"MLX's weights.*give the folder"):
        read_adapter(folder(tmp_path) / "adapters.safetensors")


# --- writing -----------------------------------------------------------------------------------

DELTAS: dict[str, Delta] = {
    "model.layers.0.self_attn.q_proj": Delta(numbers(2, 4), numbers(6, 2), 0.5),
    "model.layers.1.self_attn.q_proj": Delta(numbers(3, 4), numbers(6, 3), 0.5),
    "lm_head": Delta(numbers(2, 4), numbers(6, 2), 2.0),
    "model.embed_tokens": Delta(numbers(2, 9), numbers(4, 2), 0.5, EMBEDDING),
}


def test_what_is_written_has_one_rank_and_one_scale_and_the_same_effect(tmp_path: Path) -> None:
    linear = {name: own for name, own in DELTAS.items() if own.kind != EMBEDDING}
    out = write_adapter(adapter(linear), tmp_path / "out", format="mlx")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 3,
        "scale": 0.5,
        "dropout": 0.0,
        "keys": ["lm_head", "self_attn.q_proj"],
    }
    tensors = safetensors.numpy.load_file(out / "adapters.safetensors")
    for name, own in linear.items():
        # MLX's own formula.
        product = tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"] * 0.5
        expected = (own.b @ own.a * own.scale).T
        assert_close(product, expected)
        assert_close(applied(np.zeros(product.T.shape), read_adapter(out).deltas[name]), expected.T)


def test_dora_is_written(tmp_path: Path) -> None:
    own = {"q": Delta(numbers(2, 4), numbers(6, 2), 0.5, magnitude=numbers(6))}
    out = write_adapter(adapter(own), tmp_path / "out", format="mlx")
    assert json.loads((out / "adapter_config.json").read_text())["fine_tune_type"] == "dora"
    assert_same_bits(np.asarray(read_adapter(out).deltas["q"].magnitude), numbers(6))


@pytest.mark.parametrize(
    "own, words",
    [
        (adapter({"q": delta(4, 6)}, {"n.weight": numbers(4)}), "n.weight: is a whole weight"),
        (adapter({"c": Delta(numbers(2, 4, 3, 3), numbers(6, 2), 1.0, Conv((3, 3)))}), "c: is a convolution"),
        (adapter({"e": replace(DELTAS["model.embed_tokens"], magnitude=numbers(4))}), "e: is a table, whose change"),
        (adapter({"q": replace(delta(4, 6), magnitude=numbers(6)), "v": delta(4, 6)}), "v (and 0 more): has no DoRA"),
    ],
)
def test_what_mlx_cannot_hold_is_refused_by_name(tmp_path: Path, own: Adapter, words: str) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        write_adapter(own, tmp_path / "out", format="mlx")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())
