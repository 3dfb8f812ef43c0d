"""Which base an adapter was made for: names that tell, names that do not, and numbers of base weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from onnx_lora import Package, bind
from onnx_lora.adapters.bases import base_number, base_problem, is_base_number
from onnx_lora.errors import BindError
from tests.adapters.building import ORIGIN, PackageBuilder, adapter, delta


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return PackageBuilder(tmp_path / "package").point("q", 4, 6).point("v", 4, 5).open()


def made_from(package: Package, **source: str) -> Package:
    return replace(package, manifest=replace(package.manifest, source=source))


@pytest.mark.parametrize(
    "trained_on, source",
    [
        ("meta-llama/Llama-3.1-8B", {"made_by": "genai", "from": "meta-llama/Llama-3.2-8B"}),
        ("/home/me/bert-base-cased", {"made_by": "optimum", "from": "bert-base-uncased"}),
        ("gpt2", {"made_by": "attach", "from": "model.onnx", "base": "gpt2-medium"}),
        ("models--google--gemma-2b/snapshots/0a1b2c3d4e", {"made_by": "optimum", "from": "google/gemma-7b"}),
    ],
)
def test_an_adapter_that_names_another_base_is_noted_and_strictly_refused(
    package: Package, trained_on: str, source: dict[str, str]
) -> None:
    it = replace(adapter({"q": delta(4, 6)}), origin=replace(ORIGIN, base_model=trained_on))
    named = made_from(package, **source)
    (note,) = [note for note in bind(it, named).coverage.notes if "was trained on" in note]
    assert trained_on in note
    assert source.get("base", source["from"]) in note
    with pytest.raises(BindError, match="was trained on"):
        bind(it, named, strict=True)


@pytest.mark.parametrize(
    "trained_on, source",
    [
        ("meta-llama/Llama-3.1-8B", {"made_by": "genai", "from": "Llama-3.1-8B"}),
        ("meta-llama/Llama-3.1-8B@main", {"made_by": "genai", "from": "me/llama-3.1-8b/"}),
        ("unsloth/llama-3.1-8b-unsloth-bnb-4bit", {"made_by": "genai", "from": "meta-llama/Llama-3.1-8B"}),
        ("C:\\\\models\\\\gpt2", {"made_by": "optimum", "from": "openai-community/gpt2"}),
        ("/cache/models--org--tiny/snapshots/0a1b2c3d4e5f", {"made_by": "optimum", "from": "org/tiny"}),
        # What it was trained from, or what it is called: either may be meant.
        ("me/sst2-bert", {"made_by": "optimum", "from": "sst2-bert", "base": "bert-base-uncased"}),
        ("bert-base-uncased", {"made_by": "optimum", "from": "sst2-bert", "base": "bert-base-uncased"}),
        # Names that tell nothing, on either side.
        ("", {"made_by": "optimum", "from": "gpt2"}),
        ("./output/checkpoint-500", {"made_by": "optimum", "from": "gpt2"}),
        ("/tmp/merged_model", {"made_by": "optimum", "from": "gpt2"}),
        ("/cache/0a1b2c3d4e5f0a1b2c3d4e5f0a1b2c3d4e5f0a1b", {"made_by": "optimum", "from": "gpt2"}),
        ("gpt2", {"made_by": "optimum", "from": "checkpoint"}),
        ("gpt2", {"made_by": "attach", "from": "decoder.onnx"}),
        ("gpt2", {"made_by": "torch.onnx", "from": "GPT2LMHeadModel"}),
        ("gpt2", {}),
    ],
)
def test_no_alarm_where_names_agree_or_tell_nothing(package: Package, trained_on: str, source: dict[str, str]) -> None:
    assert base_problem(trained_on, made_from(package, **source)) is None


def test_a_name_of_a_megabyte_is_shown_by_its_end(package: Package) -> None:
    problem = base_problem("x" * 2**20 + "/llama", made_from(package, base="gpt2"))
    assert problem is not None
    assert len(problem) < 1000


def test_a_number_stands_for_the_weights_that_are_touched(tmp_path: Path, package: Package) -> None:
    other = PackageBuilder(tmp_path / "other").point("v", 4, 5).point("q", 4, 6).open()  # of other values
    number = base_number(["q"], package.manifest.graphs)
    assert is_base_number(number)
    assert number == base_number(["q.lora_A.weight", "q.lora_B.weight"], package.manifest.graphs)
    assert number != base_number(["v"], package.manifest.graphs)
    assert number != base_number(["q"], other.manifest.graphs)
    assert not is_base_number(1)
