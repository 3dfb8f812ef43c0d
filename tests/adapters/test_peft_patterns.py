"""Lists of names and expressions in PEFT's configs mean what PEFT makes of them, however long they are."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lora import read_adapter
from onnx_lora.adapters.formats.peft.patterns import Patterns
from onnx_lora.adapters.methods.endings import Endings
from onnx_lora.errors import AdapterFileError
from onnx_lora.expressions import ExpressionError
from onnx_lora.points import matches, matching
from tests.adapters.building import lora, numbers, peft_folder

PIECES = st.sampled_from(["a", "b", ".", r"\.", r"\_", "_", "^", "$", "|", "a.", "b+", "(b|_)"])
TEXTS = st.lists(st.lists(PIECES, max_size=4).map("".join), max_size=6)
NAMES = st.text("ab._", max_size=7)
PEFT = {"at end": r"(.*\.)?({})$", "around": r"(^|.*\.){}($|\..*)"}


@settings(max_examples=400, deadline=None)
@given(texts=TEXTS, name=NAMES, where=st.sampled_from(["at end", "around"]))
def test_plain_names_and_expressions_match_as_in_peft(texts: list[str], name: str, where: Any) -> None:
    wanted = [number for number, text in enumerate(texts) if re.match(PEFT[where].replace("{}", text), name)]
    patterns = Patterns(texts, where)
    assert patterns.all(name) == wanted
    assert patterns.first(name) == (wanted[0] if wanted else None)


@settings(max_examples=400, deadline=None)
@given(names=st.lists(NAMES, max_size=6), modules=st.lists(NAMES, max_size=3))
def test_many_names_are_looked_up_as_each_alone_would_be(names: list[str], modules: list[str]) -> None:
    assert matching(names, modules) == {name for name in names if any(matches(module, [name]) for module in modules)}
    for module in modules:
        assert Endings(names).covers(module) == matches(module, names)
        assert Endings(names).first(module) == next((i for i, name in enumerate(names) if module.endswith(name)), None)


def test_the_first_of_two_that_match_counts() -> None:
    assert Patterns(["v", "layers.0.q", ".*q", "q"], "at end").first("m.layers.0.q") == 1
    assert Patterns(["[q]", "m.q"], "at end").first("m.q") == 0


@pytest.mark.parametrize("key", ["layers.{}.q", "^m.layers.{}.q", r"^m\.layers\.{}\.q"])
def test_a_table_that_names_every_module_costs_one_look_at_each(key: str) -> None:
    count = 16_000
    patterns = Patterns([key.format(layer) for layer in range(count)], "at end")
    begin = time.perf_counter()
    assert [patterns.first(f"m.layers.{layer}.q") for layer in range(count)] == list(range(count))
    assert time.perf_counter() - begin < 20  # seconds; each look at each key takes minutes


def test_too_many_expressions_are_refused() -> None:
    with pytest.raises(ExpressionError, match="more than 1000 expressions"):
        Patterns([f"q{number}+" for number in range(1001)], "at end")


# --- configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        {"target_modules": r".*\.(a+)+"},
        {"exclude_modules": "(.*)*(a+)+b"},
        {"rank_pattern": {"(a+)+": 3}},
        {"alpha_pattern": {"(a+)+": 3}},
        {"modules_to_save": ["(a+)+"]},
        {"layers_to_transform": [0], "layers_pattern": ["(a+)+"]},
        {"trainable_token_indices": {"(a+)+": [1]}},
    ],
)
def test_no_field_of_a_config_hangs(tmp_path: Path, field: dict[str, Any]) -> None:
    module = f"m.{'a' * 60}!"
    folder = peft_folder(tmp_path, lora(module, 4, 6), **{"target_modules": [module]} | field)
    begin = time.perf_counter()
    with contextlib.suppress(AdapterFileError):
        assert len(read_adapter(folder).deltas) == 1
    assert time.perf_counter() - begin < 5  # seconds


def test_feedforward_modules_do_not_hang(tmp_path: Path) -> None:
    module = f"m.{'a' * 60}!"
    config = {"peft_type": "IA3", "target_modules": [module], "feedforward_modules": "(.*)*(a+)+b"}
    folder = peft_folder(
        tmp_path,
        {f"base_model.model.{module}.ia3_l": numbers(6, 1)},
        remove=["r", "lora_alpha", "lora_dropout", "init_lora_weights"],
        **config,
    )
    assert read_adapter(folder).changes[module].method == "IA3"


@pytest.mark.parametrize(
    "pattern, chosen",
    [
        ("layers", [True, False]),
        ("(layers|blocks)", [True, False]),
        ("h", [False, False]),
        ("", [False, False]),
    ],
)
def test_layers_are_those_of_the_named_list(tmp_path: Path, pattern: str, chosen: list[bool]) -> None:
    for layer, wanted in enumerate(chosen):
        tensors = lora(f"m.layers.{layer}.experts.0.q", 4, 6)
        folder = peft_folder(tmp_path, tensors, layers_to_transform=[0], layers_pattern=[pattern or "x"])
        if wanted:
            assert len(read_adapter(folder).deltas) == 1
        else:
            with pytest.raises(AdapterFileError, match="does not choose it"):
                read_adapter(folder)


@pytest.mark.parametrize("pattern", ["layers|h", r"layers(\.\d+\.experts)?"])
def test_layers_whose_number_is_not_told_are_refused(tmp_path: Path, pattern: str) -> None:
    tensors = lora("m.layers.1.experts.0.q", 4, 6)
    with pytest.raises(AdapterFileError, match="does not tell which number"):
        read_adapter(peft_folder(tmp_path, tensors, layers_to_transform=[0], layers_pattern=[pattern]))
