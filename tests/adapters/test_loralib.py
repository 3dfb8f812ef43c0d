"""Files with loralib's names of tensors, which PEFT would ignore: the numbers of loralib's own formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lora import bind, read_adapter
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from onnx_lora.points import Array
from tests.adapters.building import PackageBuilder, effect, lora, numbers, peft_folder
from tests.support.numbers import assert_close


def _factors(module: str, inputs: int, outputs: int, *, rank: int = 2, groups: int = 1) -> dict[str, Array]:
    """As `loralib.lora_state_dict` names them."""
    return {
        f"{module}.lora_A": numbers(rank * groups, inputs, seed=1),
        f"{module}.lora_B": numbers(outputs, rank, seed=2),
    }


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_loralibs_linear_is_read_with_its_own_formula(tmp_path: Path, prefix: str) -> None:
    """loralib 0.1.2, `Linear.forward`: `x @ lora_A.T @ lora_B.T * lora_alpha / r`."""
    tensors = _factors(f"{prefix}m.q", 4, 6)
    adapter = read_adapter(peft_folder(tmp_path / "a", tensors, lora_alpha=8))
    assert any("loralib's names" in note for note in adapter.notes)
    package = PackageBuilder(tmp_path / "p").point("m.q", 4, 6).open()
    a: Any = tensors[f"{prefix}m.q.lora_A"]
    b: Any = tensors[f"{prefix}m.q.lora_B"]
    expected = b @ a * 8 / 2
    assert_close(effect(bind(adapter, package).tensors, "m.q")[0], expected.T)


def test_biases_beside_loralibs_names_are_whole_weights(tmp_path: Path) -> None:
    tensors = _factors("m.q", 4, 6) | {"m.q.bias": numbers(6)}
    assert set(read_adapter(peft_folder(tmp_path, tensors, bias="lora_only")).replacements) == {"m.q.bias"}


def test_loralibs_merged_linear_needs_the_projections_that_it_changes(tmp_path: Path) -> None:
    tensors = _factors("m.q", 4, 6, groups=2)
    with pytest.raises(
        UnsupportedAdapterError, match=r"m\.q\.lora_A: of loralib's MergedLinear, .*enable_lora"
    ) as caught:
        read_adapter(peft_folder(tmp_path / "without", tensors))
    assert len(caught.value.problems) == 1
    adapter = read_adapter(peft_folder(tmp_path / "with", tensors, enable_lora=[True, False, True]))
    delta: Any = adapter.deltas["m.q"]
    a: Any = tensors["m.q.lora_A"]
    b: Any = tensors["m.q.lora_B"]
    expected = np.zeros((9, 4), "float32")
    expected[:3] = b[:3] @ a[:2]
    expected[6:] = b[3:] @ a[2:]
    assert_close(delta.b @ delta.a, expected)


@pytest.mark.parametrize("option", ["use_rslora", "use_dora", "lora_bias"])
def test_loralibs_names_with_options_that_it_has_not_are_refused(tmp_path: Path, option: str) -> None:
    fields: dict[str, Any] = {option: True}
    with pytest.raises(UnsupportedAdapterError, match="is of neither"):
        read_adapter(peft_folder(tmp_path, _factors("m.q", 4, 6), **fields))


def test_loralibs_names_among_pefts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"m\.v\.lora_A: named as loralib"):
        read_adapter(peft_folder(tmp_path, lora("m.q", 4, 6) | _factors("m.v", 4, 6)))


def test_factors_the_other_way_round_are_refused(tmp_path: Path) -> None:
    tensors = {"m.q.lora_A": numbers(4, 2), "m.q.lora_B": numbers(2, 6)}
    with pytest.raises(AdapterFileError, match="the rank must be 2"):
        read_adapter(peft_folder(tmp_path, tensors))
