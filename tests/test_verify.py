"""What `verify` compares: like with like, several adapters, converted ones, folded models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from peft.tuners.tuners_utils import BaseTunerLayer

from onnx_lora import Package, attach, bind, fold_to, read_adapter, verify, write_adapter
from onnx_lora.cli import cli
from onnx_lora.errors import InputError, ModelError, VerificationError
from onnx_lora.exporter import TriedAdapter, verify_folded
from onnx_lora.exporter.verification.adapters import put_on_model
from onnx_lora.runtime import read_folded
from tests.support.models import make_adapter, make_model

pytestmark = pytest.mark.slow

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, packages: Make, checkpoints: Make) -> Path:
    """A package and its checkpoint, and adapters: two LoRAs, and an OFT."""
    import peft

    folder = tmp_path_factory.mktemp("verify")
    (folder / "package").symlink_to(packages("bert"))
    (folder / "checkpoint").symlink_to(checkpoints("bert"))
    make_adapter(make_model("bert"), folder / "one", r=4, target_modules=["query"])
    make_adapter(make_model("bert"), folder / "two", r=2, target_modules=["value"], modules_to_save=None, seed=3)
    tuned = peft.get_peft_model(make_model("bert"), peft.OFTConfig(oft_block_size=4, target_modules=["key"]))
    for name, parameter in tuned.named_parameters():
        if "oft_R" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder / "oft")
    return folder


def _tried(desk: Path, name: str, weight: float = 1.0) -> TriedAdapter:
    package = Package.open(desk / "package")
    return TriedAdapter(name, desk / name, bind(read_adapter(desk / name), package).tensors, weight)


def test_several_adapters_are_compared_one_by_one(desk: Path) -> None:
    compared = verify(
        Package.open(desk / "package"),
        desk / "checkpoint",
        adapters=[_tried(desk, "one"), _tried(desk, "two"), _tried(desk, "one")],
    )
    assert all(entry.agrees for entry in compared)
    assert [entry.adapter for entry in compared if entry.case == "adapter"] == ["one", "two", "one"]
    swapped = [_tried(desk, "one"), TriedAdapter("two", desk / "two", _tried(desk, "one").tensors)]
    with pytest.raises(VerificationError, match="the base agrees, and what the adapters change does not") as caught:
        verify(Package.open(desk / "package"), desk / "checkpoint", adapters=swapped)
    assert all("adapter two" in problem for problem in caught.value.problems)


def test_another_checkpoint_is_no_adapters_fault(desk: Path, tmp_path: Path) -> None:
    make_model("bert", seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(VerificationError, match="the base differs already, so no adapter is at fault"):
        verify(Package.open(desk / "package"), tmp_path / "other", adapters=[_tried(desk, "one")])


@pytest.mark.parametrize("format", ["onnx_adapter", "safetensors"])
def test_a_converted_adapter_is_compared_with_the_original(desk: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / f"one.{format}"
    write_adapter(read_adapter(desk / "one"), out, format=format, package=Package.open(desk / "package"))
    command = ["verify", str(desk / "package"), "--reference", str(desk / "checkpoint"), "--adapter", str(out)]
    done = CliRunner().invoke(cli, [*command, "--original", str(desk / "one")], catch_exceptions=False)
    assert done.exit_code == 0
    with pytest.raises(VerificationError):
        CliRunner().invoke(cli, [*command, "--original", str(desk / "two")], catch_exceptions=False)


def test_an_adapter_of_another_tool_is_given_to_peft_as_a_folder(desk: Path, tmp_path: Path) -> None:
    package = Package.open(desk / "package")
    file = write_adapter(
        read_adapter(desk / "two"), tmp_path / "two.safetensors", format="safetensors", package=package
    )
    command = ["verify", str(desk / "package"), "--reference", str(desk / "checkpoint"), "--adapter", str(file)]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0


# --- somebody else's graphs --------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["token_type_ids", "attention_mask"])
def test_a_graph_without_an_input_is_compared_without_it(desk: Path, tmp_path: Path, lacking: str) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        desk / "checkpoint", attn_implementation="eager"
    ).eval()

    class Short(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.classifier = model.bert, model.classifier
            self.whole = [model]

        def forward(self, input_ids: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            name = "attention_mask" if lacking == "token_type_ids" else "token_type_ids"
            result: torch.Tensor = self.whole[0](input_ids=input_ids, **{name: other}).logits
            return result

    ids = torch.randint(1, 90, (2, 8))
    other = torch.ones_like(ids) if lacking == "token_type_ids" else torch.zeros_like(ids)
    kept = "attention_mask" if lacking == "token_type_ids" else "token_type_ids"
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", kept)}
    torch.onnx.export(
        Short().eval(),
        (ids, other),
        str(tmp_path / "model.onnx"),
        input_names=["input_ids", kept],
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
        opset_version=17,
    )
    package = attach(tmp_path / "model.onnx", tmp_path / "package", checkpoint=desk / "checkpoint")
    compared = verify(package, desk / "checkpoint")
    assert all(entry.agrees for entry in compared)
    assert {entry.left_out for entry in compared if entry.case == "base"} == {(lacking,)}
    wrong = Package.open(package.path)
    make_model("bert", seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(VerificationError, match=rf"the base differs already \(compared without {lacking}\)"):
        verify(wrong, tmp_path / "other")


# --- folded models -----------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [{"one": 1.0}, {"two": 0.5}, {"one": 1.0, "two": 0.25}, {"oft": 1.0}], ids=str)
def test_a_folded_model_is_compared_with_what_is_in_it(desk: Path, tmp_path: Path, parts: dict[str, float]) -> None:
    fold_to(desk / "package", [(desk / name, weight) for name, weight in parts.items()], tmp_path / "folded")
    model = read_folded(tmp_path / "folded")
    assert model is not None
    assert [(one.name, one.weight) for one in model.adapters] == list(parts.items())
    assert model.fingerprint == Package.open(desk / "package").fingerprint
    tried = [TriedAdapter(name, desk / name, weight=weight) for name, weight in parts.items()]
    compared = verify_folded(model, desk / "checkpoint", tried)
    assert compared
    assert all(entry.agrees for entry in compared)
    with pytest.raises(VerificationError, match="other adapters or weights were folded in"):
        verify_folded(model, desk / "checkpoint", [TriedAdapter("two", desk / "two", weight=-1.0)])


def test_groups_of_a_folded_model_are_pefts_layers(desk: Path, tmp_path: Path) -> None:
    groups = {"layer.0": -2.0, "*": 0.5}
    fold_to(desk / "package", [(desk / "two", groups)], tmp_path / "folded")
    model = read_folded(tmp_path / "folded")
    assert model is not None
    compared = verify_folded(model, desk / "checkpoint", [TriedAdapter("two", desk / "two", weight=groups)])
    assert all(entry.agrees for entry in compared)
    for others in ({"layer.0": 2.0, "*": 0.5}, {"layer.0": -2.0}, 0.5):
        with pytest.raises(VerificationError, match="other adapters or weights were folded in"):
            verify_folded(model, desk / "checkpoint", [TriedAdapter("two", desk / "two", weight=others)])


def test_a_folded_model_says_what_is_in_it_and_no_path(desk: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fold_to(desk / "package", desk / "one", tmp_path / name / "folded")
    one, other = ((tmp_path / name / "folded" / "model.onnx").read_bytes() for name in ("a", "b"))
    assert one == other
    (entry,) = [entry for entry in onnx.load_from_string(one).metadata_props if entry.key == "onnx_lora.folded"]
    assert str(tmp_path) not in entry.value
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "a" / "folded")], catch_exceptions=False)
    assert "one: times 1, LoRA" in shown.output


def test_scales_of_the_model_itself_are_no_adapters_scales(tmp_path: Path) -> None:
    # Llama's attention holds a number called `scaling`.
    make_adapter(make_model("llama"), tmp_path / "one", r=4, target_modules=["q_proj"])
    model = make_model("llama")
    with put_on_model(model, [TriedAdapter("one", tmp_path / "one", weight=0.5)]):
        scales = [dict(layer.scaling) for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    assert scales
    assert all(scale == {"adapter0": scales[0]["adapter0"]} for scale in scales)


def test_what_peft_cannot_weigh_is_told(desk: Path, tmp_path: Path) -> None:
    fold_to(desk / "package", desk / "oft", tmp_path / "folded")
    model = read_folded(tmp_path / "folded")
    assert model is not None
    with pytest.raises(ModelError, match="PEFT cannot weigh the adapter 'oft'"):
        verify_folded(model, desk / "checkpoint", [TriedAdapter("oft", desk / "oft", weight=0.5)])


def test_a_model_that_an_adapter_could_not_be_put_on_is_as_it_was(desk: Path) -> None:
    model = make_model("bert")
    with (
        pytest.raises(ModelError, match="cannot weigh"),
        put_on_model(model, [TriedAdapter("oft", desk / "oft", weight=0.5)]),
    ):
        pass
    assert not [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def test_a_folded_model_that_says_nothing_is_told_from_a_package(desk: Path, tmp_path: Path) -> None:

    shutil.copytree(
        desk / "package", tmp_path / "plain", ignore=lambda _, names: [n for n in names if n.endswith("json")]
    )
    command = [
        "verify",
        str(tmp_path / "plain"),
        "--reference",
        str(desk / "checkpoint"),
        "--adapter",
        str(desk / "one"),
    ]
    with pytest.raises(InputError, match="must be a package, or a folded model that says what it was made of"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
