"""Adapters of a class that fuses projections, on packages of one that does not, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lora import Package, bind
from onnx_lora.adapters import Adapter, Delta, Replacement
from onnx_lora.adapters.methods.output_scale import OutputScale
from onnx_lora.errors import BindError
from onnx_lora.points import Array
from tests.adapters.building import PackageBuilder, adapter, bound, delta, effect, numbers
from tests.support.numbers import assert_close, assert_same_bits

WIDTH = 8
PHI = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": WIDTH}
SIZES = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
FUSED = "m.attn.qkv_proj"


def _fused(folder: Path, config: dict[str, Any] | None = None, name: str = "qkv_proj", outputs: int = 16) -> Package:
    builder = PackageBuilder(folder).point(f"m.attn.{name}", WIDTH, outputs).point("m.attn.o_proj", WIDTH, WIDTH)
    builder.config = PHI if config is None else config
    return builder.open()


def _split(folder: Path, model: str = "llama") -> Package:
    builder = PackageBuilder(folder)
    for part, size in SIZES.items():
        builder.point(f"m.attn.{part}", WIDTH, size)
    builder.config = PHI | {"model_type": model}
    return builder.open()


def _parts(*parts: str, scales: tuple[float, ...] = (0.5, 0.5, 0.5)) -> dict[str, Delta]:
    """Deltas of ranks 1, 2, 3."""
    found: dict[str, Delta] = {}
    for number, (part, size) in enumerate(SIZES.items()):
        if part in parts:
            found[f"m.attn.{part}"] = delta(WIDTH, size, rank=number + 1, scale=scales[number], seed=number * 2)
    return found


def _effect_of(delta: Delta) -> Array:
    """`[in, out]`, in float64."""
    product: Array = delta.b.astype(np.float64) @ delta.a.astype(np.float64) * delta.scale
    return product.T


def _refused(package: Package, own: Adapter) -> list[str]:
    with pytest.raises(BindError) as caught:
        bind(own, package)
    return list(caught.value.problems)


@pytest.mark.parametrize("scales", [(0.3, 0.3, 0.3), (0.3, 1.7, 1.0)], ids=["one scale", "several scales"])
def test_parts_are_put_below_one_another(tmp_path: Path, scales: tuple[float, ...]) -> None:
    parts = _parts(*SIZES, scales=scales)
    own = bound(_fused(tmp_path / "p"), parts)
    assert own.coverage.ranks == {FUSED: 6}
    assert own.coverage.notes == ("q_proj, k_proj and v_proj are parts of one module of this package, qkv_proj",)
    expected = np.concatenate([_effect_of(part) for part in parts.values()], axis=1)[None]
    assert_close(effect(own.tensors, FUSED), expected)


@pytest.mark.parametrize("scales", [(0.3, 0.3, 0.3), (0.3, 1.7, 1.0)], ids=["one scale", "several scales"])
def test_the_numbers_of_each_part_are_those_that_it_has_alone(tmp_path: Path, scales: tuple[float, ...]) -> None:
    parts = _parts(*SIZES, scales=scales)
    fused = bound(_fused(tmp_path / "fused"), parts).tensors
    alone = bound(_split(tmp_path / "split"), parts).tensors
    rank = row = 0
    for part, size in SIZES.items():
        a, b = alone[f"m.attn.{part}.lora_A.weight"], alone[f"m.attn.{part}.lora_B.weight"]
        ranks, rows = slice(rank, rank + a.shape[2]), slice(row, row + size)
        assert_same_bits(np.ascontiguousarray(fused[f"{FUSED}.lora_A.weight"][:, :, ranks]), a)
        assert_same_bits(np.ascontiguousarray(fused[f"{FUSED}.lora_B.weight"][:, ranks, rows]), b)
        rank, row = ranks.stop, rows.stop


def test_a_part_without_a_delta_stays_as_it_is(tmp_path: Path) -> None:
    parts = _parts("q_proj", "v_proj")
    own = effect(bound(_fused(tmp_path / "p"), parts).tensors, FUSED)[0]
    assert not own[:, 8:12].any()
    assert_close(own[:, 12:], _effect_of(parts["m.attn.v_proj"]))


@pytest.mark.parametrize("model", ["llama", "phi3"])
def test_a_fused_delta_is_cut_by_rows(tmp_path: Path, model: str) -> None:
    """A package of Phi-3 has the parts where a graph of GenAI's came without its checkpoint."""
    whole = delta(WIDTH, 16, rank=3, scale=0.3)
    own = bound(_split(tmp_path / "p", model), {FUSED: whole})
    assert own.coverage.notes == ("qkv_proj is in this package q_proj, k_proj and v_proj, each with its rows of B",)
    joined = np.concatenate([effect(own.tensors, f"m.attn.{part}") for part in SIZES], axis=2)
    assert_close(joined[0], _effect_of(whole))


def test_what_was_fused_out_of_parts_gets_its_own_ranks_again(tmp_path: Path) -> None:
    parts = _parts(*SIZES)
    b = np.zeros((16, 6), np.float32)
    b[:8, :1], b[8:12, 1:3], b[12:, 3:] = (part.b for part in parts.values())
    whole = Delta(np.concatenate([part.a for part in parts.values()]), b, 0.5)
    assert list(bound(_split(tmp_path / "p"), {FUSED: whole}).coverage.ranks.values()) == [1, 2, 3]


def test_magnitudes_go_with_their_rows(tmp_path: Path) -> None:
    magnitude = np.abs(numbers(16, seed=9)) + 1
    whole = Delta(numbers(2, WIDTH), numbers(16, 2), 0.5, magnitude=magnitude)
    own = bound(_split(tmp_path / "split"), {FUSED: whole})
    assert_same_bits(own.magnitudes["m.attn.k_proj"], magnitude[8:12])
    parts: dict[str, Delta] = {}
    for number, (name, part) in enumerate(_parts(*SIZES).items()):
        parts[name] = Delta(part.a, part.b, part.scale, magnitude=np.full(len(part.b), number + 1, np.float32))
    fused = bound(_fused(tmp_path / "fused"), parts)
    assert_same_bits(fused.magnitudes[FUSED], np.repeat([1, 2, 3], list(SIZES.values())).astype(np.float32))
    del parts["m.attn.k_proj"]
    [problem] = _refused(_fused(tmp_path / "other"), adapter(parts))
    assert "DoRA on one of them needs DoRA on all" in problem


def test_gate_and_up_are_halves(tmp_path: Path) -> None:
    package = _fused(tmp_path / "p", {"model_type": "glm4"}, "gate_up_proj", outputs=12)
    gate = delta(WIDTH, 6)
    own = effect(bound(package, {"m.attn.gate_proj": gate}).tensors, "m.attn.gate_up_proj")[0]
    assert_close(own[:, :6], _effect_of(gate))
    assert not own[:, 6:].any()


def test_flat_names_of_parts_are_understood(tmp_path: Path) -> None:
    flat = {name.replace(".", "_"): part for name, part in _parts(*SIZES).items()}
    assert bound(_fused(tmp_path / "p"), flat, flat_names=True).coverage.ranks == {FUSED: 6}


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, config",
    [
        ("qkv_proj", {"model_type": "codegen"}),
        ("qkv_proj", {}),
        ("query_key_value", PHI),
        ("c_attn", {"model_type": "gpt2"}),
    ],
)
def test_rows_of_an_unknown_order_are_refused(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    [problem] = _refused(_fused(tmp_path / "p", config, name), adapter(_parts(*SIZES)))
    assert problem.startswith("m.attn.q_proj (and 2 more): one of package and adapter has " + name)
    assert "is not known here; export the class that the adapter was trained on" in problem


def test_a_fused_module_of_an_unknown_order_is_refused(tmp_path: Path) -> None:
    [problem] = _refused(_split(tmp_path / "p", model="gptj"), adapter({FUSED: delta(WIDTH, 16)}))
    assert "how models of type 'gptj' order the outputs of qkv_proj is not known here" in problem


@pytest.mark.parametrize("lacking", [{"num_attention_heads": None}, {"num_key_value_heads": 4}])
def test_a_config_that_says_other_sizes_is_refused(tmp_path: Path, lacking: dict[str, Any]) -> None:
    [problem] = _refused(_fused(tmp_path / "p", PHI | lacking), adapter(_parts(*SIZES)))
    assert "the package's config.json must say how many of its 16 outputs" in problem


def test_parts_of_other_sizes_are_refused(tmp_path: Path) -> None:
    parts = _parts("q_proj") | {"m.attn.k_proj": delta(WIDTH, 8)}
    [problem] = _refused(_fused(tmp_path / "p"), adapter(parts))
    assert problem.startswith("m.attn.k_proj: must have factors for 8 inputs and 4 outputs, and has A (2, 8)")
    [problem] = _refused(_fused(tmp_path / "q"), adapter(_parts("q_proj") | {"m.attn.k_proj": delta(5, 4)}))
    assert problem.startswith("m.attn.k_proj: must have factors for 8 inputs")


@pytest.mark.parametrize(
    "more",
    [
        {"replacements": {"m.attn.q_proj.bias": Replacement(numbers(8))}},
        {"changes": {"m.attn.k_proj": OutputScale(numbers(4))}},
    ],
    ids=["whole weight", "other method"],
)
def test_what_is_no_pair_of_factors_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    whole = more.pop("replacements", None)
    [problem] = _refused(_fused(tmp_path / "p"), adapter(_parts("q_proj"), whole, **more))
    assert "the package has qkv_proj there, to which only LoRA and DoRA are taken over" in problem


def test_a_part_beside_the_fused_module_is_refused(tmp_path: Path) -> None:
    [problem] = _refused(_fused(tmp_path / "p"), adapter(_parts("q_proj") | {FUSED: delta(WIDTH, 16)}))
    assert "the adapter has it fused and in parts too" in problem


def test_a_fused_module_without_a_point_is_named(tmp_path: Path) -> None:
    builder = PackageBuilder(tmp_path / "p").point("m.attn.o_proj", WIDTH, WIDTH)
    builder.untargeted, builder.config = (FUSED,), PHI
    [problem] = _refused(builder.open(), adapter(_parts("q_proj")))
    assert "export again with `targets=` including qkv_proj" in problem
