"""GGUF LoRA files: llama.cpp's names, its order of rows and its scale, and files that lie about themselves."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lora import Package, bind, read_adapter
from onnx_lora.adapters import Adapter, Delta
from onnx_lora.adapters.formats.gguf.architectures import ARCHITECTURES, MODEL_TYPES
from onnx_lora.adapters.formats.gguf.rows import rows_interleaved, rows_of_halves
from onnx_lora.adapters.write import write_adapter
from onnx_lora.errors import AdapterFileError, BindError, UnsupportedAdapterError
from onnx_lora.kinds import EMBEDDING
from onnx_lora.points import Array
from tests.adapters.building import PackageBuilder, adapter, delta, numbers
from tests.adapters.merging import applied
from tests.support.numbers import assert_close, assert_same_bits

gguf = pytest.importorskip("gguf")

LAYER = "model.layers.0"


def file(
    path: Path,
    tensors: Mapping[str, Array],
    *,
    arch: str = "qwen2",
    alpha: float | None = 4.0,
    fields: Mapping[str, Any] | None = None,
    quantized: str | None = None,
) -> Path:
    """As `convert_lora_to_gguf.py` writes one."""
    writer = gguf.GGUFWriter(str(path), arch)
    texts = {"general.type": "adapter", "adapter.type": "lora"} | dict(fields or {})
    for key, value in texts.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
        else:
            writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        if quantized is None:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            kind = gguf.GGMLQuantizationType[quantized]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str, a: Array | None = None, b: Array | None = None) -> dict[str, Array]:
    return {
        f"{name}.weight.lora_a": numbers(2, 4) if a is None else a,
        f"{name}.weight.lora_b": numbers(8, 2, seed=1) if b is None else b,
    }


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_name_of_the_table_is_ggufs_own_and_comes_back(arch: str) -> None:
    theirs = gguf.get_tensor_name_map(next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 12)
    for name, module in ARCHITECTURES[arch].names.items():
        own, module = f"{name.format(11)}.weight", module.format(11)
        assert theirs.get_name(module) == name.format(11), (arch, module)
        assert ARCHITECTURES[arch].to_module(own) == module
        assert ARCHITECTURES[arch].from_module(module) == own


def test_every_kind_of_model_has_an_architecture_that_gguf_knows() -> None:
    assert set(MODEL_TYPES.values()) <= set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values())


def test_names_that_are_no_modules_have_no_counterpart() -> None:
    arch = ARCHITECTURES["llama"]
    assert arch.to_module("blk.0.attn_q.bias") is None
    assert arch.to_module("blk.0.ffn_up_exps.weight") is None
    assert arch.from_module("model.layers.0.self_attn.qkv_proj") is None


# --- factors and scales ------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, scale", [(4.0, 2.0), (1.0, 0.5), (0.0, 1.0), (None, 1.0)])
def test_the_scale_is_alpha_over_rank_and_1_without_alpha(tmp_path: Path, alpha: float | None, scale: float) -> None:
    own = read_adapter(file(tmp_path / "x.gguf", pair("blk.0.ffn_down"), alpha=alpha))
    assert own.deltas[f"{LAYER}.mlp.down_proj"].scale == scale
    assert_same_bits(own.deltas[f"{LAYER}.mlp.down_proj"].a, numbers(2, 4))
    assert (own.name, own.origin.format, own.origin.method) == ("x", "gguf", "LoRA")


def test_the_table_of_tokens_has_its_a_the_other_way_round(tmp_path: Path) -> None:
    own = read_adapter(file(tmp_path / "x", pair("token_embd", a=numbers(9, 2)))).deltas["model.embed_tokens"]
    assert (own.kind, own.a.shape, own.b.shape) == (EMBEDDING, (2, 9), (8, 2))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_stay_what_they_are(tmp_path: Path, dtype: str) -> None:
    tensors = pair("output", numbers(2, 4, dtype=dtype), numbers(8, 2, dtype=dtype))
    assert read_adapter(file(tmp_path / "x", tensors)).deltas["lm_head"].a.dtype == dtype


@pytest.mark.parametrize("kind, tolerance", [("Q8_0", 0.03), ("Q4_0", 0.5), ("BF16", 0.02)])
def test_quantized_factors_are_dequantized(tmp_path: Path, kind: str, tolerance: float) -> None:
    a, b = numbers(32, 64), numbers(8, 32)
    own = read_adapter(file(tmp_path / "x", pair("output", a, b), quantized=kind)).deltas["lm_head"]
    assert own.a.dtype == np.float32
    assert np.abs(own.a - a).max() < tolerance


# --- the order of rows -------------------------------------------------------------------------


def llama_permute(weights: Array, n_head: int) -> Array:
    """llama.cpp's `LlamaModel.permute`."""
    swapped: Array = weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:]).swapaxes(1, 2)
    return swapped.reshape(weights.shape)


def test_interleaving_is_llama_cpps_and_is_undone() -> None:
    b = numbers(24, 2)
    assert_same_bits(rows_interleaved(b, 3), llama_permute(b, 3))
    assert_same_bits(rows_of_halves(rows_interleaved(b, 3), 3), b)
    assert not np.array_equal(rows_interleaved(b, 3), b)


ROWS = {**pair("blk.0.attn_q", b=llama_permute(numbers(8, 2, seed=1), 2))}
ROWS |= pair("blk.0.attn_k", b=llama_permute(numbers(4, 2, seed=2), 1))


def llama(tmp_path: Path, config: Mapping[str, Any] | None) -> Package:
    builder = PackageBuilder(tmp_path / "package")
    builder.point(f"{LAYER}.self_attn.q_proj", 4, 8).point(f"{LAYER}.self_attn.k_proj", 4, 4)
    package = builder.open()
    if config is not None:
        (package.path / "config.json").write_text(json.dumps(config))
    return package


def in_order(own: Mapping[str, Delta]) -> None:
    assert_same_bits(own[f"{LAYER}.self_attn.q_proj"].b, numbers(8, 2, seed=1))
    assert_same_bits(own[f"{LAYER}.self_attn.k_proj"].b, numbers(4, 2, seed=2))


def test_queries_and_keys_of_llama_are_put_in_order_with_the_packages_heads(tmp_path: Path) -> None:
    own = read_adapter(file(tmp_path / "x", ROWS, arch="llama"))
    assert not own.deltas
    bound = bind(own, llama(tmp_path, {"num_attention_heads": 2, "num_key_value_heads": 1}))
    b = {name: bound.tensors[f"{LAYER}.self_attn.{name}_proj.lora_B.weight"][0].T / 2 for name in "qk"}
    assert_close(b["q"], numbers(8, 2, seed=1))
    assert_close(b["k"], numbers(4, 2, seed=2))


def test_keys_have_as_many_heads_as_queries_where_the_config_does_not_say(tmp_path: Path) -> None:
    tensors = pair("blk.0.attn_k", b=llama_permute(numbers(4, 2, seed=2), 2))
    package = llama(tmp_path, {"num_attention_heads": 2})
    bound = bind(read_adapter(file(tmp_path / "x", tensors, arch="llama")), package)
    assert_close(bound.tensors[f"{LAYER}.self_attn.k_proj.lora_B.weight"][0].T / 2, numbers(4, 2, seed=2))


def test_heads_that_the_file_names_need_no_package(tmp_path: Path) -> None:
    heads = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
    in_order(read_adapter(file(tmp_path / "x", ROWS, arch="llama", fields=heads)).deltas)


@pytest.mark.parametrize(
    "config", [None, {}, {"num_attention_heads": 3}, {"num_attention_heads": "2"}, {"num_attention_heads": 0}]
)
def test_without_the_number_of_heads_it_is_refused(tmp_path: Path, config: Mapping[str, Any] | None) -> None:
    with pytest.raises(BindError, match=r"q_proj: llama.cpp orders the outputs .*num_attention_heads"):
        bind(read_adapter(file(tmp_path / "x", ROWS, arch="llama")), llama(tmp_path, config))


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_a_broken_config_is_none(tmp_path: Path, text: bytes) -> None:
    package = llama(tmp_path, None)
    (package.path / "config.json").write_bytes(text)
    with pytest.raises(BindError, match="num_attention_heads"):
        bind(read_adapter(file(tmp_path / "x", ROWS, arch="llama")), package)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors, more, words",
    [
        (pair("blk.0.ffn_up"), {"fields": {"general.type": "model"}}, "must be a LoRA adapter"),
        (pair("blk.0.ffn_up"), {"fields": {"adapter.type": "other"}}, "must be a LoRA adapter"),
        (pair("blk.0.ffn_up"), {"alpha": float("nan")}, "adapter.lora.alpha must be a number"),
        ({"blk.0.ffn_up.weight.lora_a": numbers(2, 4)}, {}, "blk.0.ffn_up.weight: has lora_a alone"),
        (pair("blk.0.ffn_up", b=numbers(8, 3)), {}, "must be of one rank"),
        (pair("blk.0.ffn_up", a=numbers(2, 2, 2)), {}, "must be of one rank"),
        (pair("blk.0.ffn_up", a=numbers(2, 4).astype("i4")), {}, "must be floating point, and is int32"),
        ({}, {}, "holds no tensor of an adapter"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Array], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(file(tmp_path / "x", tensors, **more))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "tensors, more, words",
    [
        (pair("blk.0.ffn_up"), {"arch": "mamba"}, "architecture 'mamba' are not known here"),
        (pair("blk.0.ffn_up"), {"fields": {"adapter.alora.invocation_tokens": [1, 2]}}, "aLoRA"),
        (pair("blk.0.ffn_up_exps"), {}, "blk.0.ffn_up_exps.weight: has no counterpart"),
        ({"blk.0.attn_norm.weight": numbers(4)}, {}, "blk.0.attn_norm.weight: is a whole weight"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Array], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_adapter(file(tmp_path / "x", tensors, **more))
    assert words in str(caught.value)


def raw(tensors: int = 0, fields: int = 0, body: bytes = b"", *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


PADDED = bytes(64)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"GGUF", "cut off"),
        (b"", "cut off"),
        (raw(version=1), "version 1"),
        (raw(version=3 << 24), "big-endian"),
        (raw(tensors=2**60), "cannot hold 1152921504606846976 tensors"),
        (raw(fields=2**60), "cannot hold 1152921504606846976 fields"),
        (raw(fields=1, body=struct.pack("<Q", 2**50) + bytes(32)), "a text of 1125899906842624 bytes is too long"),
        (
            raw(fields=1, body=text("a") + struct.pack("<IIQ", 9, 4, 2**40) + bytes(32)),
            "cannot hold 1099511627776 values in an array",
        ),
        (raw(fields=1, body=text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(32)), "arrays of type 9"),
        (raw(fields=1, body=text("a") + struct.pack("<I", 77) + bytes(32)), "values of type 77"),
        (raw(fields=1, body=struct.pack("<Q", 1) + b"\xff" + bytes(32)), "damaged"),
        (raw(fields=2, body=(text("a") + struct.pack("<II", 4, 1)) * 2), "'a' comes twice"),
        (raw(fields=1, body=text("general.alignment") + struct.pack("<II", 4, 3)), "power of two"),
        (raw(tensors=1, body=text("a") + struct.pack("<I", 5) + bytes(64)), "5 axes"),
        (raw(tensors=1, body=info("a", (2**62, 2**62)) + PADDED), "does not fit the file"),
        (raw(tensors=1, body=info("a", (4,), offset=2**63) + PADDED), "does not fit the file"),
        (raw(tensors=1, body=info("a", (4,), kind=999) + PADDED), "type 999 is not known"),
        (raw(tensors=1, body=info("a", (5,), kind=8) + PADDED), "does not fit the file"),
        (raw(tensors=2, body=info("a", (4,)) + info("b", (4,)) + PADDED), "b: lies where a lies"),
        (raw(tensors=2, body=info("a", (4,)) + info("a", (4,), offset=32) + PADDED), "a name comes twice"),
    ],
)
def test_a_file_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(path)
    assert words in str(caught.value)


# --- writing -----------------------------------------------------------------------------------

CONFIG = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}


def whole_llama(tmp_path: Path, config: Mapping[str, Any] = CONFIG) -> Package:
    builder = PackageBuilder(tmp_path / "package")
    for name, outputs in {"self_attn.q_proj": 8, "self_attn.k_proj": 4, "mlp.down_proj": 6}.items():
        builder.point(f"{LAYER}.{name}", 4, outputs)
    package = builder.open()
    (package.path / "config.json").write_text(json.dumps(config))
    return package


DELTAS = {
    f"{LAYER}.self_attn.q_proj": Delta(numbers(2, 4), numbers(8, 2), 0.5),
    f"{LAYER}.self_attn.k_proj": Delta(numbers(2, 4), numbers(4, 2, dtype="float16"), 0.5),
    f"{LAYER}.mlp.down_proj": Delta(numbers(3, 4), numbers(6, 3), 2.0),
}


def test_ggufs_own_reader_reads_what_is_written(tmp_path: Path) -> None:
    path = write_adapter(adapter(DELTAS), tmp_path / "x.gguf", format="gguf", package=whole_llama(tmp_path))
    reader = gguf.GGUFReader(path)
    fields = {name: entry.contents() for name, entry in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 1.0)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert_same_bits(tensors["blk.0.attn_q.weight.lora_b"], llama_permute(numbers(8, 2), 2))
    # llama.cpp: alpha over B's rank times B · A.
    own = tensors["blk.0.ffn_down.weight.lora_b"] @ tensors["blk.0.ffn_down.weight.lora_a"] * (1.0 / 3)
    assert_close(own, numbers(6, 3) @ numbers(3, 4) * 2)


def test_what_is_written_reads_back_without_a_package(tmp_path: Path) -> None:
    path = write_adapter(adapter(DELTAS), tmp_path / "x.gguf", format="gguf", package=whole_llama(tmp_path))
    again = read_adapter(path).deltas
    for name, own in DELTAS.items():
        zeros = np.zeros((len(own.b), 4))
        assert_close(applied(zeros, again[name]), applied(zeros, own))


@pytest.mark.parametrize(
    "own, config, words",
    [
        (adapter(DELTAS), {"model_type": "bert"}, "must be one of llama"),
        (adapter(DELTAS), {}, "no config.json of a package says which it is"),
        (adapter(DELTAS), {"model_type": "llama"}, "must say num_attention_heads"),
        (
            adapter({f"{LAYER}.mlp.down_proj": Delta(numbers(2, 4), numbers(6, 2), 1.0, magnitude=numbers(6) + 9)}),
            CONFIG,
            "DoRA",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused_by_name(
    tmp_path: Path, own: Adapter, config: Mapping[str, Any], words: str
) -> None:
    package = whole_llama(tmp_path, config)
    with pytest.raises(UnsupportedAdapterError) as caught:
        write_adapter(own, tmp_path / "x.gguf", format="gguf", package=package)
    assert words in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


def test_a_module_that_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "package").point("model.layers.0.mlp.other", 4, 6).open()
    (package.path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UnsupportedAdapterError, match=r"is no module that llama\.cpp has a name for in llama models"):
        write_adapter(
            adapter({"model.layers.0.mlp.other": delta(4, 6)}), tmp_path / "x", format="gguf", package=package
        )
