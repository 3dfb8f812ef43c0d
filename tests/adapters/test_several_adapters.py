"""Several PEFT adapters in one folder or file, of which a name chooses one; and adapters out of memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from onnx_lora import read_adapter
from onnx_lora.adapters import Delta
from onnx_lora.errors import AdapterFileError, InputError, UnsupportedAdapterError
from onnx_lora.points import Array
from onnx_lora.runtime.binding import bind_adapter
from tests.adapters.building import BASE_CONFIG, PackageBuilder, lora, numbers, peft_folder

TASKS = ("code", "retrieval", "text-matching")


def _named(tensors: Mapping[str, Array], name: str) -> dict[str, Array]:
    """The tensors with an adapter's name in their keys."""
    return {key.replace(".weight", f".{name}.weight"): value for key, value in tensors.items()}


def _of_tasks() -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for seed, task in enumerate(TASKS):
        tensors |= _named(lora("m.q", 4, 6, seed=10 * seed), task)
    return tensors


def _a(adapter: Any) -> Array:
    delta = adapter.deltas["m.q"]
    assert isinstance(delta, Delta)
    return delta.a


# --- in one file -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, task", list(enumerate(TASKS)))
def test_a_name_chooses_one_of_several_in_a_file(tmp_path: Path, seed: int, task: str) -> None:
    adapter = read_adapter(peft_folder(tmp_path, _of_tasks()), name=task)
    assert adapter.name == task
    assert np.array_equal(_a(adapter), numbers(2, 4, seed=10 * seed))


def test_without_a_name_several_in_a_file_are_refused_and_nothing_else_is_said(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(peft_folder(tmp_path, _of_tasks()))
    assert 'code, retrieval, text-matching; choose one: `name="code"`' in str(caught.value)
    assert caught.value.problems == ()


def test_a_name_that_is_none_of_several_is_refused_with_the_closest_first(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="none of them is 'retreival': retrieval, "):
        read_adapter(peft_folder(tmp_path, _of_tasks()), name="retreival")


def test_whole_modules_go_with_the_adapter_of_their_name(tmp_path: Path) -> None:
    tensors = _of_tasks()
    for task in TASKS:
        tensors[f"base_model.model.head.modules_to_save.{task}.weight"] = np.full((2, 4), len(task), "float32")
    adapter = read_adapter(peft_folder(tmp_path, tensors, modules_to_save=["head"]), name="code")
    assert set(adapter.replacements) == {"head.weight"}
    assert (adapter.replacements["head.weight"].value == len("code")).all()


def test_a_tensor_of_nobody_among_several_is_refused(tmp_path: Path) -> None:
    tensors = _of_tasks() | {"base_model.model.m.q.bias": numbers(6)}
    with pytest.raises(AdapterFileError, match="says of none of the adapters that it is theirs") as caught:
        read_adapter(peft_folder(tmp_path, tensors), name="code")
    assert len(caught.value.problems) == 1


# --- in one folder -----------------------------------------------------------------------------


def _peft_with(folder: Path, *names: str) -> Path:
    """What PEFT saves of a model with these adapters; A of the n-th is filled with n."""
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6)})
    config = LoraConfig(r=2, target_modules=["q"])
    adapted = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    for number, name in enumerate(names):
        layer: Any = adapted.get_submodule("base_model.model.q")
        torch.nn.init.constant_(layer.lora_A[name].weight, float(number))
    adapted.save_pretrained(folder)
    return folder


def _number(adapter: Any) -> float:
    return float(adapter.deltas["q"].a[0, 0])


def test_the_adapter_at_the_top_is_read_without_a_name_and_the_others_are_noted(tmp_path: Path) -> None:
    folder = _peft_with(tmp_path / "all", "default", "sql", "law")
    adapter = read_adapter(folder)
    assert (adapter.name, _number(adapter)) == ("all", 0)
    assert any("law, sql; a name chooses one" in note for note in adapter.notes)
    assert _number(read_adapter(folder, name="default")) == 0


@pytest.mark.parametrize("number, name", [(1, "sql"), (2, "law")])
def test_a_name_chooses_the_folder_below(tmp_path: Path, number: int, name: str) -> None:
    adapter = read_adapter(_peft_with(tmp_path, "default", "sql", "law"), name=name)
    assert (adapter.name, _number(adapter)) == (name, number)
    assert Path(adapter.origin.path) == tmp_path / name
    assert not any("below" in note for note in adapter.notes)


def test_a_name_that_is_none_of_the_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="none of them is 'squl': sql, default, law; choose one"):
        read_adapter(_peft_with(tmp_path, "default", "sql", "law"), name="squl")


def test_folders_without_an_adapter_above_them_must_be_chosen(tmp_path: Path) -> None:
    folder = _peft_with(tmp_path, "sql", "law")
    with pytest.raises(AdapterFileError, match="several adapters in folders below, and none was chosen: law, sql;"):
        read_adapter(folder)
    with pytest.raises(AdapterFileError, match="none of them is 'lawn': law, sql;"):
        read_adapter(folder, name="lawn")
    assert _number(read_adapter(folder, name="sql")) == 0


def test_the_checkpoints_of_a_training_are_no_other_adapters(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "out")
    peft_folder(folder / "checkpoint-100", lora("m.q", 4, 6, seed=9))
    adapter = read_adapter(folder, name="sql")
    assert (adapter.name, adapter.notes) == ("sql", ())
    assert np.array_equal(_a(read_adapter(folder, name="checkpoint-100")), numbers(2, 4, seed=9))


def test_the_initial_adapter_is_no_other_adapter(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "out", init_lora_weights="pissa")
    initial = peft_folder(folder / "pissa_init", lora("m.q", 4, 6, seed=9))
    adapter = read_adapter(folder, name="sql", initial=initial)
    assert adapter.name == "sql"
    assert not any("below" in note for note in adapter.notes)


@pytest.mark.parametrize("name", ["../out", ".", "/etc", ""])
def test_a_name_leads_to_no_folder_but_those_below(tmp_path: Path, name: str) -> None:
    peft_folder(tmp_path / "out")
    peft_folder(tmp_path / "both" / "one")
    with pytest.raises(AdapterFileError, match="choose one"):
        read_adapter(tmp_path / "both", name=name)


def test_a_sessions_name_for_an_adapter_chooses_nothing(tmp_path: Path) -> None:
    package = PackageBuilder(tmp_path / "package").point("m.q", 4, 6).open()
    folder = peft_folder(tmp_path / "out")
    peft_folder(folder / "sql", lora("m.q", 4, 6, seed=9))
    bound = bind_adapter(folder, package, name="sql")
    assert bound.name == "sql"
    assert np.array_equal(bound.tensors["m.q.lora_A.weight"][0].T, numbers(2, 4, seed=1))


# --- from memory -------------------------------------------------------------------------------


def test_arrays_and_a_config_are_what_their_folder_is(tmp_path: Path) -> None:
    tensors = lora("m.q", 4, 6)
    of_folder = read_adapter(peft_folder(tmp_path, tensors))
    adapter = read_adapter(tensors, config=BASE_CONFIG, name="sql")
    assert (adapter.name, adapter.origin.path, adapter.origin.method) == ("sql", "memory", "LoRA")
    assert adapter.deltas["m.q"].scale == of_folder.deltas["m.q"].scale
    assert np.array_equal(_a(adapter), _a(of_folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_peft_holds_in_memory_is_read_as_its_folder_is(tmp_path: Path, dtype: torch.dtype) -> None:
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6), "v": torch.nn.Linear(4, 6)}).to(dtype)
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q"], modules_to_save=["v"])
    adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    torch.nn.init.normal_(adapted.base_model.model.q.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path)
    of_folder = read_adapter(tmp_path)
    for fields in (config.to_dict(), tmp_path, tmp_path / "adapter_config.json"):
        adapter = read_adapter(get_peft_model_state_dict(adapted), config=fields)
        one, other = adapter.deltas["q"], of_folder.deltas["q"]
        assert isinstance(one, Delta)
        assert isinstance(other, Delta)
        assert (one.scale, one.a.dtype) == (other.scale, other.a.dtype)
        assert np.array_equal(one.a, other.a)
        assert np.array_equal(one.b, other.b)
        assert adapter.replacements.keys() == of_folder.replacements.keys()
        assert adapter.saved_modules == of_folder.saved_modules


def test_an_adapter_from_memory_does_not_change_with_the_callers_arrays() -> None:
    tensors = lora("m.q", 4, 6)
    adapter = read_adapter(tensors, config=BASE_CONFIG)
    before = _a(adapter).copy()
    for values in tensors.values():
        values[:] = 0
    assert np.array_equal(_a(adapter), before)


def test_the_number_of_tensors_in_memory_is_the_same_in_any_order() -> None:
    tensors = lora("m.q", 4, 6)
    backwards = dict(reversed(list(tensors.items())))
    one, other = (read_adapter(each, config=BASE_CONFIG).origin.sha256 for each in (tensors, backwards))
    assert one == other
    assert one != read_adapter(lora("m.q", 4, 6, seed=5), config=BASE_CONFIG).origin.sha256


def test_a_name_chooses_one_of_several_in_memory() -> None:
    assert np.array_equal(_a(read_adapter(_of_tasks(), config=BASE_CONFIG, name="retrieval")), numbers(2, 4, seed=10))
    with pytest.raises(AdapterFileError, match="none was chosen: code, retrieval"):
        read_adapter(_of_tasks(), config=BASE_CONFIG)


def test_the_initial_adapter_is_taken_out_of_one_from_memory_too(tmp_path: Path) -> None:
    initial = peft_folder(tmp_path, lora("m.q", 4, 6, seed=9))
    adapter = read_adapter(lora("m.q", 4, 6), config=BASE_CONFIG | {"init_lora_weights": "pissa"}, initial=initial)
    assert _a(adapter).shape == (4, 4)


def test_memory_is_checked_as_files_are() -> None:
    key = "base_model.model.m.q.lora_B.weight"
    with pytest.raises(AdapterFileError, match=r"^memory: its tensors must be what adapter_config\.json says"):
        read_adapter(lora("m.q", 4, 6, rank=3), config=BASE_CONFIG)
    with pytest.raises(AdapterFileError, match="must be floating point, and is int64"):
        read_adapter(lora("m.q", 4, 6) | {key: np.zeros((6, 2), "int64")}, config=BASE_CONFIG)
    with pytest.raises(UnsupportedAdapterError, match=r"^memory: says what cannot be applied exactly"):
        read_adapter(lora("m.q", 4, 6), config=BASE_CONFIG | {"use_qalora": True, "layer_replication": [[0, 1]]})
    with pytest.raises(AdapterFileError, match="peft_type"):
        read_adapter(lora("m.q", 4, 6), config={})


@pytest.mark.parametrize(
    "value, found",
    [
        ([[1.0]], "it is a list"),
        (np.ma.masked_array(np.zeros((6, 2)), np.ones((6, 2), bool)), "it is a MaskedArray"),
        (torch.zeros(6, 2, device="meta"), "must be a dense array"),
        (torch.zeros(6, 2).to_sparse(), "must be a dense array"),
        (torch.zeros(6, 2).to(torch.float8_e4m3fn), "must be a dense array"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_by_name(value: Any, found: str) -> None:
    key = "base_model.model.m.q.lora_B.weight"
    with pytest.raises(AdapterFileError, match=found) as caught:
        read_adapter(lora("m.q", 4, 6) | {key: value}, config=BASE_CONFIG)
    assert caught.value.problems[0].startswith(f"{key}: ")


def test_names_that_are_no_text_or_cannot_be_printed_are_refused() -> None:
    tensors: dict[Any, Any] = {3: numbers(2, 4), "a\nb": numbers(2, 4)}
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(tensors, config=BASE_CONFIG)
    assert len(caught.value.problems) == 2


def test_tensors_need_a_config_and_files_take_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tensors from memory need PEFT's config"):
        read_adapter(lora("m.q", 4, 6))
    with pytest.raises(InputError, match="goes with tensors from memory only"):
        read_adapter(peft_folder(tmp_path), config=json.loads((tmp_path / "adapter_config.json").read_text()))
    with pytest.raises(InputError, match=r"a path must be text or a pathlib\.Path, and is int"):
        read_adapter(lora("m.q", 4, 6), config=3)  # type: ignore[arg-type]
