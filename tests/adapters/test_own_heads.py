"""Adapters of a task whose file lacks the task's head: the base's own stays there, unless it was never trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onnx_lora import Package, bind, read_adapter, write_bound
from onnx_lora.errors import BindError
from onnx_lora.manifest import MANIFEST
from tests.adapters.building import PackageBuilder, adapter, delta, lora, numbers, peft_folder


def _package(folder: Path, untrained: Sequence[str] | None, *heads: str) -> Package:
    """A package with a point, and heads that are replaceable."""
    builder = PackageBuilder(folder).point("m.q", 4, 6)
    for head in heads or ("classifier",):
        builder.weight(f"{head}.weight", 4, 2, free=True)
        builder.bias(f"{head}.bias", 2, free=True)
    made = builder.open().manifest
    known = replace(made, untrained=None if untrained is None else tuple(untrained))
    (folder / MANIFEST).write_text(known.to_json())
    return Package.open(folder)


def _without_head(folder: Path, **config: Any) -> Path:
    return peft_folder(folder, lora("m.q", 4, 6), target_modules=["q"], task_type="SEQ_CLS", **config)


def test_the_bases_own_head_stays_and_is_named(tmp_path: Path) -> None:
    bound = bind(read_adapter(_without_head(tmp_path / "a")), _package(tmp_path / "p", []))
    (note,) = [note for note in bound.coverage.notes if note.startswith("classifier:")]
    assert "the base's own stays" in note
    assert bound.coverage.replaced == ()


def test_a_head_that_was_new_at_export_is_refused(tmp_path: Path) -> None:
    package = _package(tmp_path / "p", ["classifier.bias", "classifier.weight"])
    with pytest.raises(BindError, match=r"classifier: .* newly initialised at export") as caught:
        bind(read_adapter(_without_head(tmp_path / "a")), package)
    assert len(caught.value.problems) == 1


def test_where_nobody_knows_whether_the_head_was_trained_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BindError, match="does not say whether the base's own was trained"):
        bind(read_adapter(_without_head(tmp_path / "a")), _package(tmp_path / "p", None))


def test_a_head_that_the_config_names_must_be_in_the_file(tmp_path: Path) -> None:
    """Neither PEFT nor transformers loads such a file."""
    folder = _without_head(tmp_path / "a", modules_to_save=["classifier"])
    with pytest.raises(BindError, match="the config says that PEFT saved this module whole"):
        bind(read_adapter(folder), _package(tmp_path / "p", []))


@pytest.mark.parametrize("untrained", [None, [], ["classifier.weight", "classifier.bias"]])
def test_a_head_in_the_file_takes_the_place_of_any(tmp_path: Path, untrained: Sequence[str] | None) -> None:
    own = adapter(
        {"m.q": delta(4, 6)},
        {"classifier.weight": numbers(3, 4), "classifier.bias": numbers(3)},
        task_heads=("classifier", "score"),
    )
    bound = bind(own, _package(tmp_path / "p", untrained))
    assert not any("classifier" in note for note in bound.coverage.notes)


def test_a_model_without_the_tasks_head_needs_none(tmp_path: Path) -> None:
    bound = bind(read_adapter(_without_head(tmp_path / "a")), _package(tmp_path / "p", None, "decoder"))
    assert not any("head" in note for note in bound.coverage.notes)


def test_what_else_was_new_and_is_not_brought_is_noted(tmp_path: Path) -> None:
    package = _package(tmp_path / "p", ["pre.weight", "pre.bias", "absent.weight"], "pre", "classifier")
    whole = {"classifier.weight": numbers(2, 4), "classifier.bias": numbers(2)}
    (note,) = bind(adapter({"m.q": delta(4, 6)}, whole), package).coverage.notes[-1:]
    assert note.startswith("pre: random numbers")
    with_all = whole | {"pre.weight": numbers(2, 4), "pre.bias": numbers(2)}
    assert not any("random" in note for note in bind(adapter({"m.q": delta(4, 6)}, with_all), package).coverage.notes)


def test_the_head_is_part_of_the_base_that_the_adapter_was_bound_to(tmp_path: Path) -> None:
    """Of two bases with the same body and other heads, an adapter that was bound to one is refused by the other."""
    one = _package(tmp_path / "one", [])
    other = _with_another_head(tmp_path / "other")
    bound = bind(read_adapter(_without_head(tmp_path / "a")), one)
    with pytest.raises(BindError, match=r"classifier\.weight was bound to another base"):
        bind(bound, other)
    file = write_bound(bound, tmp_path / "bound.safetensors")
    with pytest.raises(BindError, match=r"bound to another base: 1 of 3 base weights differ, the first is classifier"):
        bind(read_adapter(file), other)
    assert bind(read_adapter(file), one).coverage.applied == ("m.q",)


def _with_another_head(folder: Path) -> Package:
    """The package with another digest of its head."""
    _package(folder, [])
    data = json.loads((folder / MANIFEST).read_text())
    for weight in data["graphs"][0]["replaceable"]:
        if weight["name"] == "classifier.weight":
            weight["sha256"] = "f" * 64
    (folder / MANIFEST).write_text(json.dumps(data))
    return Package.open(folder)
