"""Every cause for which a PEFT folder is refused, one test each; and what is read with a note."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from onnx_lora import read_adapter
from onnx_lora.adapters.formats.peft.reader import read_peft
from onnx_lora.adapters.formats.peft.refused import refusals
from onnx_lora.adapters.methods.registry import METHODS
from onnx_lora.errors import AdapterFileError, UnsupportedAdapterError
from tests.adapters.building import lora, numbers, peft_folder
from tests.support.numbers import assert_close

P = "base_model.model."


@pytest.mark.parametrize(
    "field, value",
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("a_field_of_tomorrow", {"x": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "PiSSA"),
        ("init_lora_weights", ["list"]),
    ],
)
def test_fields_that_change_the_meaning_are_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    folder = peft_folder(tmp_path, **{field: value})
    with pytest.raises(UnsupportedAdapterError, match=field) as caught:
        read_adapter(folder)
    assert caught.value.path == str(folder / "adapter_config.json")


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_dora", False),
        ("ensure_weight_tying", True),
        ("target_parameters", ["experts.w"]),
        ("layer_replication", None),
        ("a_field_of_tomorrow", None),
        ("a_field_of_tomorrow", False),
        ("loftq_config", {}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "ipm"}),
        ("velora_config", {"num_groups": 4}),
        ("qalora_group_size", 16),
        ("megatron_core", "megatron.core"),
        ("auto_mapping", {"base_model_class": "X"}),
        ("merge_weights", True),
        ("fan_in_fan_out", True),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("peft_version", "0.99"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", None),
        ("rank_pattern", None),
        ("alpha_pattern", None),
        ("bias", None),
    ],
)
def test_harmless_fields_change_nothing(tmp_path: Path, field: str, value: object) -> None:
    delta = read_adapter(peft_folder(tmp_path, **{field: value})).deltas["m.q"]
    assert delta.scale == 4.0
    assert np.array_equal(delta.a, lora("m.q", 4, 6)[f"{P}m.q.lora_A.weight"])


@pytest.mark.parametrize(
    "method, cure",
    [
        ("PREFIX_TUNING", "changes the prompt, not the weights"),
        ("ADAPTION_PROMPT", "changes the prompt, not the weights"),
        ("XLORA", "routes among adapters"),
        ("POLY", "routes among adapters"),
        ("LILY", "another thing for every input"),
        ("ROAD", "merge"),
    ],
)
def test_other_methods_are_refused_with_their_cure(tmp_path: Path, method: str, cure: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"{method}.*{cure}"):
        read_adapter(peft_folder(tmp_path, peft_type=method))


@pytest.mark.parametrize("method", ["FINEGATES", None, 7, ["LORA"]])
def test_unknown_methods_are_refused(tmp_path: Path, method: object) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"peft_type must be one of LORA, .*, and is .*: merge"):
        read_adapter(peft_folder(tmp_path, peft_type=method))


def test_every_method_of_peft_is_read_or_refused_by_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for method in peft.PeftType:
        if method.value not in METHODS:
            with pytest.raises(UnsupportedAdapterError, match=f"is '{method.value}': "):
                read_adapter(peft_folder(tmp_path, peft_type=method.value))


def test_every_method_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text("utf-8")
    for field in (*METHODS, *METHODS["LORA"].refused):
        assert f"`{field}`" in text, field


def test_every_field_of_every_method_of_peft_is_known(tmp_path: Path) -> None:
    """A field that a later PEFT adds is refused until it is understood."""
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    for name, method in METHODS.items():
        fields = {field.name for field in dataclasses.fields(mapping[name])}
        problems = refusals(dict.fromkeys(fields, True), method, with_initial=False)
        assert not [problem for problem in problems if "not known here" in problem], name


@pytest.mark.parametrize(
    "config, words",
    [
        ({"r": 0}, "r must be a rank of at least 1, and is 0"),
        ({"r": None}, "r must be a rank"),
        ({"r": True}, "r must be a rank"),
        ({"r": "8"}, "r must be a rank"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"lora_alpha": 10**299}, "lora_alpha must be a finite number"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"rank_pattern": ["q"]}, "rank_pattern must map"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": 3}, "target_modules must be a list"),
        ({"target_modules": [1]}, "target_modules must be a list"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "cannot go with"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"layers_to_transform": "0"}, "layer numbers"),
        ({"exclude_modules": "("}, "no regular expression"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list"),
        ({"bias": "some"}, "bias must be"),
    ],
)
def test_configs_that_peft_would_not_load_are_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterFileError, match="PEFT would load") as caught:
        read_adapter(peft_folder(tmp_path, **config))
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_missing_rank_or_alpha_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(AdapterFileError, match=key):
        read_adapter(peft_folder(tmp_path, remove=[key]))


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[1]", "JSON object"),
        ("{}", "holds nothing"),
        ('{"model_class": "BertAdapterModel", "config": {}}', "AdapterHub"),
        ('{"r": 1' + "1" * 5000 + "}", "damaged"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "a number of 401 digits"),
        ('{"base_model_name_or_path": "\\ud800"}', "damaged"),
        ('{"r": [' + "[]," * 2_000_000 + "[]]}", "at most 2000000 values"),
        ("\ufeff{}", "damaged"),
    ],
)
def test_texts_that_are_no_config_are_refused(tmp_path: Path, text: str, words: str) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_config.json").write_text(text, "utf-8")
    with pytest.raises(AdapterFileError, match=words):
        read_adapter(folder)


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    with (folder / "adapter_config.json").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(AdapterFileError, match="too large"):
        read_adapter(folder)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_adapter(peft_folder(tmp_path, kasa_config={"a": 1}, layer_replication=[[0, 2]], new=1))
    assert len(caught.value.problems) == 3


# --- files -------------------------------------------------------------------------------------


def test_a_path_with_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="there is nothing"):
        read_adapter(tmp_path / "nowhere")


def test_a_path_that_cannot_be_is_refused() -> None:
    with pytest.raises(AdapterFileError, match=r"cannot be read|there is nothing"):
        read_adapter("a\0b")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter.bin").write_bytes(b"x")
    with pytest.raises(AdapterFileError, match=r"must be a PEFT folder"):
        read_adapter(tmp_path / "adapter.bin")


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match=r"must hold adapter_config\.json.*the scale is unknown"):
        read_adapter(folder)


def test_a_config_without_weights_is_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"must hold adapter_model\.safetensors"):
        read_adapter(folder)


def test_weights_under_another_name_are_named(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "Copy of adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"'Copy of adapter_model\.safetensors' holds the adapter, rename it"):
        read_adapter(folder)


def test_a_folder_around_adapters_names_them(tmp_path: Path) -> None:
    peft_folder(tmp_path / "checkpoint-100")
    with pytest.raises(AdapterFileError, match="none was chosen: checkpoint-100; choose one"):
        read_adapter(tmp_path)


def test_a_package_is_told_from_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "onnx_lora.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="must be an adapter, and is a package of onnx-lora"):
        read_adapter(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    with pytest.raises(AdapterFileError, match="must be a file"):
        read_adapter(folder)


def test_of_both_weight_files_the_first_of_peft_is_read_and_noted(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"never looked at")
    assert "both adapter_model.safetensors and adapter_model.bin" in read_adapter(folder).notes[0]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(folder)
    assert set(read_adapter(tmp_path / "link").deltas) == {"m.q"}


def test_the_name_is_the_folders_or_the_one_given(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "sql")
    assert read_adapter(folder).name == "sql"
    assert read_adapter(folder, name="other").name == "other"


# --- tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.base_model.model."])
@pytest.mark.parametrize("adapter", ["", ".default", ".sql"])
def test_prefixes_and_adapter_names_in_keys_do_not_matter(tmp_path: Path, prefix: str, adapter: str) -> None:
    tensors = {
        key.replace(P, prefix).replace(".weight", f"{adapter}.weight"): value
        for key, value in lora("m.q", 4, 6).items()
    }
    assert set(read_adapter(peft_folder(tmp_path, tensors)).deltas) == {"m.q"}


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = lora("m.q", 4, 6)
    tensors = {key.replace(".weight", f".{name}.weight"): v for name in ("x", "y") for key, v in tensors.items()}
    with pytest.raises(AdapterFileError, match="several adapters in one file, and none was chosen: x, y"):
        read_adapter(peft_folder(tmp_path, tensors))


def test_two_different_tensors_for_one_factor_are_refused(tmp_path: Path) -> None:
    other = {key.removeprefix(P): value + 1 for key, value in lora("m.q", 4, 6).items()}
    with pytest.raises(AdapterFileError, match=r"two different tensors for lora_A of m\.q"):
        read_adapter(peft_folder(tmp_path, lora("m.q", 4, 6) | other))


@pytest.mark.parametrize("side, other", [("A", "B"), ("B", "A")])
def test_a_factor_without_the_other_is_refused(tmp_path: Path, side: str, other: str) -> None:
    tensors = lora("m.q", 4, 6)
    del tensors[f"{P}m.q.lora_{side}.weight"]
    with pytest.raises(AdapterFileError, match=f"has lora_{other} and no lora_{side}"):
        read_adapter(peft_folder(tmp_path, tensors))


def test_a_rank_other_than_the_configs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"the rank must be 4 by adapter_config\.json, and lora_A .* has rank 2"):
        read_adapter(peft_folder(tmp_path, r=4))


def test_a_rank_other_than_rank_pattern_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="the rank must be 3"):
        read_adapter(peft_folder(tmp_path, rank_pattern={"m.q": 3}))


def test_rank_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="has rank 0"):
        read_adapter(peft_folder(tmp_path, lora("m.q", 4, 6, rank=0)))


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"target_modules": ["v"]}, "target_modules .* does not choose it"),
        ({"target_modules": []}, "target_modules .* does not choose it"),
        ({"target_modules": "m"}, "target_modules .* does not choose it"),
        ({"target_modules": None}, "target_modules is null"),
        ({"target_modules": ["q"], "exclude_modules": ["m.q"]}, "exclude_modules excludes it"),
        ({"target_modules": ["q"], "exclude_modules": ".*q"}, "exclude_modules excludes it"),
        ({"target_modules": ["q"], "modules_to_save": ["m"]}, "modules_to_save covers it"),
        ({"target_modules": ["q"], "layers_to_transform": [3]}, "target_modules .with layers_to_transform. does not"),
    ],
)
def test_tensors_that_peft_would_ignore_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterFileError, match=f"m.q: has LoRA tensors that PEFT would ignore, because {reason}"):
        read_adapter(peft_folder(tmp_path, **config))


@pytest.mark.parametrize(
    "key, reason",
    [
        ("m.q.lora_E", "AdaLoRA"),
        ("m.q.lora_A", "loralib .microsoft/LoRA. and AdaLoRA name it"),
        ("m.q.adapter.linear_in.weight", "NeMo's, .* Megatron Bridge"),
        ("m.q.lora_diag.default", "KaSA"),
        ("m.q.lora_novelty.weight", "not known here"),
        ("m.q.hada_w1_a", "another method"),
        ("m.q.ia3_l", "another method"),
        ("m.emb.trainable_tokens_delta", "single trained tokens"),
    ],
)
def test_tensors_of_other_methods_are_refused_by_name(tmp_path: Path, key: str, reason: str) -> None:
    tensors = lora("m.q", 4, 6) | {P + key: numbers(2, 2)}
    with pytest.raises(UnsupportedAdapterError, match=reason) as caught:
        read_adapter(peft_folder(tmp_path, tensors))
    assert P + key in str(caught.value)


@pytest.mark.parametrize("key, value", [("trainer_version", "2026.1"), ("unsloth_version", "2025.3.19.dev0+cu124")])
def test_the_version_of_what_wrote_the_config_changes_nothing(tmp_path: Path, key: str, value: str) -> None:
    assert read_adapter(peft_folder(tmp_path, **{key: value})).deltas


def test_what_ms_swift_adds_to_the_config_changes_nothing(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, lora_dtype="bfloat16", lorap_lr_ratio=16.0, lorap_emb_lr=1e-6)
    assert read_adapter(folder).deltas


@pytest.mark.parametrize(
    "key, value", [("adapter_version", 2), ("lora_version", "v2"), ("lora_version", "2"), ("version", "1.0" + "!")]
)
def test_a_field_that_may_switch_something_is_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"{key}: not known here, and may change"):
        read_adapter(peft_folder(tmp_path, **{key: value}))


@pytest.mark.parametrize(
    "a, b, words",
    [
        ((2,), (6, 2), "must have 2 axes or more, .* not gathered from shards"),
        ((2, 4), (6, 2, 1), "the same number of axes, and those of B"),
        ((2, 4, 3, 3), (6, 2), "the same number of axes, and those of B"),
        ((2, 4, 3, 3), (6, 2, 3, 3), "the same number of axes, and those of B"),
        ((2, 4, 1, 1, 1, 1), (6, 2, 1, 1, 1, 1), "the same number of axes, and those of B"),
        ((3, 4, 3), (6, 2, 1), "the rank must be 2"),
    ],
)
def test_factors_of_no_module_are_refused(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...], words: str) -> None:
    tensors = {f"{P}m.q.lora_A.weight": numbers(*a), f"{P}m.q.lora_B.weight": numbers(*b)}
    with pytest.raises(AdapterFileError, match=f"m.q: .*{words}"):
        read_adapter(peft_folder(tmp_path, tensors))


@pytest.mark.parametrize("side, other", [("A", "B"), ("B", "A")])
def test_half_an_embeddings_pair_is_refused(tmp_path: Path, side: str, other: str) -> None:
    with pytest.raises(AdapterFileError, match=f"has lora_embedding_{side} and no lora_embedding_{other}"):
        read_adapter(peft_folder(tmp_path, {f"{P}m.q.lora_embedding_{side}": numbers(2, 2)}))


@pytest.mark.parametrize(
    "more, config, words",
    [
        ({}, {"use_dora": True}, "has no lora_magnitude_vector, and the config says use_dora"),
        ({"lora_magnitude_vector": (6,)}, {}, "has lora_magnitude_vector, DoRA's, and PEFT would ignore it"),
        ({"lora_magnitude_vector": (5,)}, {"use_dora": True}, "must have 6 values, one for each output, and has 5"),
        ({"lora_magnitude_vector": (2, 3)}, {"use_dora": True}, "must be a vector, and has shape .2, 3."),
        ({}, {"lora_bias": True}, "has no bias on lora_B, and the config says lora_bias"),
        ({"lora_B.bias": (6,)}, {}, "has a bias on lora_B, which PEFT would ignore"),
        ({"lora_B.bias": (5,)}, {"lora_bias": True}, "bias must have 6 values"),
        (
            {"lora_B.bias": (6,), "lora_magnitude_vector": (6,)},
            {"lora_bias": True, "use_dora": True},
            "lora_bias does not go with use_dora",
        ),
        ({"lora_magnitude_vector": (6,)}, {"use_dora": True, "use_qalora": True}, "does not go with use_dora"),
        ({}, {"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size of the config must be a number"),
        ({}, {"use_bdlora": {"nblocks": 2}}, "must make one of A and B of blocks"),
        ({}, {"use_bdlora": {"nblocks": 2, "novel": 1}}, "use_bdlora of the config must hold"),
        ({}, {"use_bdlora": {"nblocks": "2"}}, "must hold names and a number of blocks"),
        ({}, {"use_bdlora": {"nblocks": 4, "target_modules_bd_b": ["q"]}}, "the rank must be 2 .* in 4 blocks"),
        (
            {"lora_magnitude_vector": (6,)},
            {"use_dora": True, "use_bdlora": {"nblocks": 1, "target_modules_bd_b": ["q"]}},
            "use_bdlora does not go with use_dora",
        ),
        ({"lora_embedding_A": (2, 3)}, {}, "has lora_embedding_A and no lora_embedding_B"),
        (
            {"lora_embedding_A": (2, 3), "lora_embedding_B": (6, 2)},
            {},
            "has lora_A, lora_B beside lora_embedding_A, lora_embedding_B, and PEFT would ignore it",
        ),
    ],
)
def test_config_and_tensors_of_a_variant_must_agree(
    tmp_path: Path, more: dict[str, tuple[int, ...]], config: dict[str, Any], words: str
) -> None:
    tensors = lora("m.q", 4, 6) | {f"{P}m.q.{name}": numbers(*shape) for name, shape in more.items()}
    with pytest.raises(AdapterFileError, match=f"m.q: .*{words}"):
        read_adapter(peft_folder(tmp_path, tensors, **config))


def test_a_bias_on_b_and_a_whole_one_must_agree(tmp_path: Path) -> None:
    tensors = lora("m.q", 4, 6) | {f"{P}m.q.lora_B.bias": numbers(6), f"{P}m.q.base_layer.bias": numbers(1)}
    with pytest.raises(AdapterFileError, match=r"m\.q\.bias: must have shape \(6,\), .* and has shape \(1,\)"):
        read_adapter(peft_folder(tmp_path, tensors, lora_bias=True, bias="lora_only"))


@pytest.mark.parametrize(
    "indices, words",
    [
        (None, "must give its tokens, each once, and gives None"),
        ([1, 1], "must give its tokens, each once"),
        ([1, -1], "must give its tokens, each once"),
        ([1], "a row for each of 1 tokens, and has shape .2, 3."),
        ({"other": [1, 2]}, "must give its tokens, each once, and gives None"),
    ],
)
def test_tokens_that_are_not_told_are_refused(tmp_path: Path, indices: object, words: str) -> None:
    tensors = {f"{P}m.emb.token_adapter.trainable_tokens_delta": numbers(2, 3)}
    with pytest.raises(AdapterFileError, match=f"m.emb: .*{words}"):
        read_adapter(peft_folder(tmp_path, tensors, trainable_token_indices=indices))


def test_a_config_with_tokens_and_a_file_without_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="the config says trainable_token_indices, and the file holds none"):
        read_adapter(peft_folder(tmp_path, trainable_token_indices=[0]))


@pytest.mark.parametrize(
    "targets, tensors, words",
    [
        ("experts.w", lora("m.q", 4, 6), "target_parameters must be a list of names"),
        (
            ["x.w"],
            lora("m.x", 4, 6) | lora("m.x.base_layer", 4, 6),
            "must have lora_A and lora_B for each of its param",
        ),
        (["x.w", "x.v"], lora("m.x", 4, 6), "for each of its parameters w, v"),
        (["x.w"], {f"{P}m.x.lora_A.weight": numbers(2, 4)}, "for each of its parameters w"),
        (["x.w"], lora("m.y", 4, 6), "m.y: has LoRA tensors that PEFT would ignore"),
    ],
)
def test_pairs_of_parameters_that_are_not_told_are_refused(
    tmp_path: Path, targets: object, tensors: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterFileError, match=words):
        read_adapter(peft_folder(tmp_path, tensors, target_parameters=targets))


def test_tied_factors_without_their_twin_are_refused(tmp_path: Path) -> None:
    tensors = {f"{P}m.q.lora_embedding_A": numbers(2, 5), f"{P}m.q.lora_embedding_B": numbers(3, 2)}
    with pytest.raises(AdapterFileError, match="ensure_weight_tying, and the file holds no factors of a module"):
        read_adapter(peft_folder(tmp_path, tensors, ensure_weight_tying=True))


# --- with the initial adapter --------------------------------------------------------------------


def pissa(folder: Path, *, tensors: dict[str, Any] | None = None, **start: Any) -> tuple[Path, Path]:
    """A trained adapter of a changed base, and its initial state."""
    trained = peft_folder(folder / "trained", init_lora_weights="pissa")
    return trained, peft_folder(folder / "start", tensors or lora("m.q", 4, 6, seed=9), **start)


def test_pissa_says_what_it_needs(tmp_path: Path) -> None:
    trained, _ = pissa(tmp_path)
    with pytest.raises(UnsupportedAdapterError, match=r"give the initial adapter.*path_initial_model_for_weight_conv"):
        read_adapter(trained)


def test_pissa_is_the_difference_to_its_initial_state(tmp_path: Path) -> None:
    trained, start = pissa(tmp_path)
    delta = read_peft(trained, "x", start).deltas["m.q"]
    own, initial = lora("m.q", 4, 6), lora("m.q", 4, 6, seed=9)
    a, b = f"{P}m.q.lora_A.weight", f"{P}m.q.lora_B.weight"
    assert_close(np.asarray(delta.b @ delta.a), own[b] @ own[a] - initial[b] @ initial[a])
    assert delta.scale == 4.0


@pytest.mark.parametrize(
    "start, words",
    [
        ({"tensors": lora("m.v", 4, 6)}, "is in one of the two adapters only"),
        (
            {"tensors": lora("m.q", 4, 6, rank=3), "r": 3},
            "has shapes .2, 4., .6, 2., and those of the initial adapter are .3, 4.",
        ),
        ({"lora_alpha": 16}, "has scale 4.0, and that of the initial adapter is 8.0"),
        (
            {"tensors": lora("m.q", 4, 6) | {f"{P}m.q.lora_magnitude_vector": numbers(6)}, "use_dora": True},
            "must be LoRA and nothing else, and is DoRA",
        ),
    ],
)
def test_an_initial_state_of_another_adapter_is_refused(tmp_path: Path, start: dict[str, Any], words: str) -> None:
    trained, initial = pissa(tmp_path, **start)
    with pytest.raises(AdapterFileError, match=words) as caught:
        read_peft(trained, "x", initial)
    assert caught.value.path == str(trained)


def test_loftq_has_no_initial_state_that_would_help(tmp_path: Path) -> None:
    trained = peft_folder(tmp_path / "trained", init_lora_weights="loftq")
    with pytest.raises(UnsupportedAdapterError, match=r"init_lora_weights 'loftq'.*merge"):
        read_peft(trained, "x", peft_folder(tmp_path / "start"))


def test_integers_are_refused_by_name(tmp_path: Path) -> None:
    tensors = lora("m.q", 4, 6) | {f"{P}bn.positions": np.array(3)}
    with pytest.raises(AdapterFileError, match=r"bn\.positions: must be floating point, and is int64"):
        read_adapter(peft_folder(tmp_path, tensors))


def test_the_batches_that_a_norm_counted_are_noted_and_replace_nothing(tmp_path: Path) -> None:
    tensors = lora("m.q", 4, 6) | {f"{P}bn.num_batches_tracked": np.array(3), f"{P}bn.weight": numbers(6)}
    adapter = read_adapter(peft_folder(tmp_path, tensors))
    assert list(adapter.replacements) == ["bn.weight"]
    assert any("bn.num_batches_tracked" in note for note in adapter.notes)


def test_a_counter_of_batches_that_is_no_count_is_refused(tmp_path: Path) -> None:
    tensors = lora("m.q", 4, 6) | {f"{P}bn.num_batches_tracked": np.array([3, 4])}
    with pytest.raises(AdapterFileError, match=r"bn\.num_batches_tracked: must be floating point, and is int64"):
        read_adapter(peft_folder(tmp_path, tensors))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="holds no tensor"):
        read_adapter(peft_folder(tmp_path, {}))


def test_lora_and_a_whole_weight_of_one_module_are_refused(tmp_path: Path) -> None:
    tensors = lora("m.q", 4, 6) | {f"{P}m.q.weight": numbers(6, 4)}
    with pytest.raises(AdapterFileError, match="both LoRA and a whole weight"):
        read_adapter(peft_folder(tmp_path, tensors))


@pytest.mark.parametrize(
    "key",
    [
        "classifier.dense.weight",
        "classifier.modules_to_save.dense.weight",
        "classifier.modules_to_save.default.dense.weight",
    ],
)
def test_wrappers_of_saved_modules_do_not_matter(tmp_path: Path, key: str) -> None:
    adapter = read_adapter(peft_folder(tmp_path, {P + key: numbers(6, 4)}, modules_to_save=["classifier"]))
    assert set(adapter.replacements) == {"classifier.dense.weight"}
    assert not adapter.replacements["classifier.dense.weight"].in_place


def test_the_unused_copy_of_a_saved_module_is_noted_and_left(tmp_path: Path) -> None:
    tensors = {f"{P}score.weight": numbers(6, 4), f"{P}score.original_module.weight": numbers(6, 4, seed=9)}
    adapter = read_adapter(peft_folder(tmp_path, tensors, task_type="SEQ_CLS"))
    assert set(adapter.replacements) == {"score.weight"}
    assert np.array_equal(adapter.replacements["score.weight"].value, tensors[f"{P}score.weight"])
    assert "original_module" in adapter.notes[0]


def test_a_base_layer_in_the_file_replaces_the_base(tmp_path: Path) -> None:
    tensors = lora("m.q", 4, 6) | {f"{P}m.q.base_layer.weight": numbers(6, 4), f"{P}m.q.base_layer.bias": numbers(6)}
    adapter = read_adapter(peft_folder(tmp_path, tensors))
    assert set(adapter.replacements) == {"m.q.weight", "m.q.bias"}
    assert adapter.replacements["m.q.weight"].in_place


def test_a_config_with_bias_and_a_file_without_is_noted(tmp_path: Path) -> None:
    assert "no bias: none was changed" in read_adapter(peft_folder(tmp_path, bias="lora_only")).notes[0]


def test_alphas_that_depend_on_the_order_are_noted(tmp_path: Path) -> None:
    adapter = read_adapter(peft_folder(tmp_path, alpha_pattern={"q": 2, "m.q": 4}))
    assert adapter.deltas["m.q"].scale == 1.0
    assert "several alphas" in adapter.notes[0]


def test_methods_are_told_apart(tmp_path: Path) -> None:
    adapter = read_adapter(peft_folder(tmp_path, use_rslora=True))
    assert adapter.origin.method == "rsLoRA"
    assert adapter.deltas["m.q"].scale == 8 / 2**0.5


def test_configs_of_the_first_pefts_are_read(tmp_path: Path) -> None:
    """PEFT 0.2: few fields, and `enable_lora` null."""
    fields = {
        "base_model_name_or_path": "t5-small",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q", "v"],
        "task_type": "SEQ_2_SEQ_LM",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(lora("m.q", 4, 6)))
    assert read_adapter(tmp_path).deltas["m.q"].scale == 16.0


@pytest.mark.parametrize(
    "option, tensor",
    [({"use_dora": True}, "lora_magnitude_vector"), ({"lora_bias": True}, "lora_B.bias")],
)
def test_merged_projections_with_what_their_peft_had_not_are_refused(
    tmp_path: Path, option: dict[str, Any], tensor: str
) -> None:
    """The factors alone would be applied, and the rest of them silently left out."""
    tensors = lora("m.q", 4, 6) | {f"{P}m.q.{tensor}": numbers(6)}
    with pytest.raises(AdapterFileError, match="enable_lora goes with neither use_dora nor lora_bias"):
        read_adapter(peft_folder(tmp_path, tensors, enable_lora=[True, False], **option))


def _foreign_tensors() -> list[str]:
    """The names of the tensors of all methods but LoRA."""
    names: list[str] = []
    for peft_type in METHODS.own:
        method = METHODS[peft_type]
        names += [name for name in (*method.tensors, *method.shared) if name not in METHODS["LORA"].tensors]
    return names


@pytest.mark.parametrize("name", _foreign_tensors())
def test_another_methods_tensor_beside_lora_is_refused(tmp_path: Path, name: str) -> None:
    folder = peft_folder(tmp_path, lora("m.q", 4, 6) | {f"m.q.{name}": numbers(2, 2)})
    with pytest.raises(UnsupportedAdapterError, match=name):
        read_adapter(folder)


# --- what wrappers leave in keys ---------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "module.base_model.model.m.q",
        "_orig_mod.base_model.model.m.q",
        "module._orig_mod.base_model.model.m.q",
        "base_model.model._orig_mod.m.q",
        "base_model.model.m._fsdp_wrapped_module.q",
        "_fsdp_wrapped_module.base_model.model.m._checkpoint_wrapped_module.q",
    ],
)
def test_what_wrappers_leave_in_keys_is_no_part_of_a_name(tmp_path: Path, key: str) -> None:
    tensors = {f"{key}.{name.rpartition('m.q.')[2]}": values for name, values in lora("m.q", 4, 6).items()}
    adapter = read_adapter(peft_folder(tmp_path, tensors, target_modules=r"m\.q", alpha_pattern={r"^m\.q": 6}))
    assert {module: delta.scale for module, delta in adapter.deltas.items()} == {"m.q": 3.0}


def test_a_module_saved_twice_with_other_numbers_is_refused(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": values for name, values in lora("m.q", 4, 6, seed=9).items()}
    with pytest.raises(AdapterFileError, match=r"there are two different tensors for lora_A of m\.q"):
        read_adapter(peft_folder(tmp_path, lora("m.q", 4, 6) | wrapped))
