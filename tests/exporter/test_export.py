"""Exporting checkpoints and torch modules: what is found, what is verified, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from onnx_lora import AdapterSession, Package, bind, fold
from onnx_lora.adapters import Adapter, Origin, Replacement
from onnx_lora.errors import ExportError, ModelError, VerificationError
from onnx_lora.exporter import TorchModule, export, verify
from tests.support.exporters import HAS_OPTIMUM, VIA
from tests.support.models import make_adapter
from tests.support.numbers import assert_close

Make = Callable[[str], Path]


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Not Hugging Face's: a shared block, an attribute list, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.shared = Block(16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.shared(block(x))
        return self.classifier(x.mean(1))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Package]:
    torch.manual_seed(0)
    model = Net().eval()
    length = torch.export.Dim("length", min=2, max=64)
    package = export(
        model,
        tmp_path_factory.mktemp("net") / "package",
        example_inputs=(torch.randint(0, 50, (2, 7)),),
        dynamic_shapes=({0: torch.export.Dim("batch_size"), 1: length},),
        input_names=["ids"],
        output_names=["logits"],
    )
    return model, package


def test_a_torch_module_gets_points_by_its_scopes(net: tuple[Net, Package]) -> None:
    names = {f"{place}.{part}" for place in ("blocks.0", "blocks.1", "shared") for part in ("up", "down")}
    assert set(net[1].points) == names
    assert all(point.per_row for point in net[1].points.values())
    assert net[1].replaceable["classifier.weight"].free_outputs


def test_a_torch_module_gives_pefts_numbers(net: tuple[Net, Package], tmp_path: Path) -> None:
    model, package = Net(), net[1]
    model.load_state_dict(net[0].state_dict())
    options: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "down"]}
    adapter = make_adapter(model.eval(), tmp_path / "it", **options)
    session = AdapterSession(package)
    session.load_adapter("it", adapter)
    ids = torch.randint(0, 50, (4, 9))
    with torch.inference_mode():
        expected = model(ids).numpy()  # PEFT wrapped it in place
        base = net[0](ids).numpy()
    feeds = {"ids": ids.numpy()}
    assert_close(session.run(None, feeds)[0], base)
    assert_close(session.run(None, feeds, adapter="it")[0], expected)
    assert_close(fold(package, adapter).run(None, feeds)[0], expected)
    mixed = session.run(None, feeds, adapter=["it", None, "it", None])[0]
    assert_close(mixed, np.stack([expected[0], base[1], expected[2], base[3]]))


def test_a_torch_module_needs_example_inputs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs example_inputs"):
        export(Net(), tmp_path / "out")


def test_what_torch_cannot_trace_is_an_error_of_ours(tmp_path: Path) -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match="could not export Untraceable"):
        export(Untraceable(), tmp_path / "out", example_inputs=(torch.ones(2, 4),))
    assert list(tmp_path.iterdir()) == []


def test_export_verifies_base_adapter_and_rows(checkpoints: Make, tmp_path: Path) -> None:
    package = export(checkpoints("llama"), tmp_path / "out", via=VIA)
    assert package.manifest.source == {
        "made_by": VIA,
        "from": checkpoints("llama").name,
        "task": "text-generation-with-past",
        "precision": "fp32",
        **{name: version(name) for name in ("transformers", "optimum-onnx" if HAS_OPTIMUM else "torch")},
    }


def test_verification_sees_a_branch_that_is_wrong(net: tuple[Net, Package], tmp_path: Path) -> None:
    """One weight of one branch changed in the graph: a verification that passes would prove nothing."""
    import onnx

    broken = tmp_path / "broken"
    shutil.copytree(net[1].path, broken)
    graph = onnx.load(broken / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.name == "shared.up.lora_B":
            node.input[0], node.output[0] = node.input[0], node.output[0]
        if node.op_type == "Add" and node.name == "shared.down.lora_add":
            node.input[1] = node.input[0]  # y + y in place of y + delta
    onnx.save(graph, broken / "model.onnx")
    ids = (torch.randint(0, 50, (2, 7)),)
    assert verify(net[1], TorchModule(net[0], ids))
    with pytest.raises(VerificationError, match="must reproduce the model in PyTorch"):
        verify(Package.open(broken), TorchModule(net[0], ids))


def test_verification_leaves_the_model_as_it_was(net: tuple[Net, Package]) -> None:
    before = {name: value.clone() for name, value in net[0].state_dict().items()}
    verify(net[1], TorchModule(net[0], (torch.randint(0, 50, (2, 7)),)))
    after = net[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_half_precision(checkpoints: Make, tmp_path: Path) -> None:
    package = export(checkpoints("llama"), tmp_path / "out", via=VIA, precision="fp16")
    # Optimum's graph keeps some products in float32; their points follow the graph.
    expected = {"float16", "float32"} if HAS_OPTIMUM else {"float16"}
    assert {point.dtype for point in package.points.values()} == expected
    assert package.points["model.layers.0.self_attn.q_proj"].dtype == "float16"


def test_a_sentence_transformers_folder_is_its_transformer(checkpoints: Make, tmp_path: Path) -> None:
    from transformers import BertModel

    BertModel.from_pretrained(checkpoints("bert")).save_pretrained(tmp_path / "st")
    (tmp_path / "st" / "modules.json").write_text("[]")
    package = export(tmp_path / "st", tmp_path / "out")
    assert package.manifest.source["task"] == "feature-extraction"
    assert "encoder.layer.0.attention.self.query" in package.points


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, {"task": "image-classification"}, "image-classification"),
        ({}, {"precision": "fp8"}, "precision must be one of fp32, fp16"),
        ({"architectures": ["Mine"]}, {}, "names no class of transformers"),
        ({"model_type": "nobody_knows"}, {}, "nobody_knows"),
    ],
)
def test_checkpoints_that_cannot_be_exported(
    checkpoints: Make, tmp_path: Path, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        export(folder, tmp_path / "out", **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 160,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}


@pytest.mark.parametrize("name", ["Bart", "MBart"])
def test_of_the_tasks_of_a_class_the_first_that_is_exported_is_meant(name: str, tmp_path: Path) -> None:
    """transformers lists both among the fillers of gaps first, for which Optimum exports neither."""
    config = getattr(transformers, f"{name}Config")(**_SEQ2SEQ)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(tmp_path / "checkpoint")
    package = export(tmp_path / "checkpoint", tmp_path / "out")
    assert package.manifest.source["task"] == "text2text-generation-with-past"


def test_a_task_without_past_has_no_cache(checkpoints: Make, tmp_path: Path) -> None:
    """Whoever exports it: of the two exporters one always has a cache."""
    package = export(checkpoints("llama"), tmp_path / "out", task="text-generation", verify=False)
    assert package.manifest.source["made_by"] == VIA
    assert not any("past" in value.name for value in AdapterSession(package).get_inputs())


@pytest.mark.parametrize("replaceable", ["bias", "LayerNorm"])
def test_equal_whole_weights_that_the_exporter_kept_once_are_replaceable_apart(
    checkpoints: Make, tmp_path: Path, replaceable: str
) -> None:
    """Parameters at their first values are equal: torch.onnx keeps one, and an Identity in the place of each other."""
    package = export(checkpoints("bert"), tmp_path / "package", via=VIA, replaceable=[replaceable])
    # The bias of keys changes no attention.
    changed = [name for name in package.replaceable if name.endswith(".bias") and ".key." not in name]
    assert len({package.replaceable[name].sha256 for name in changed}) < len(changed)
    ids = np.array([[11, 42, 7], [3, 5, 8]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    session = AdapterSession(package)
    for name in changed[:3]:
        value = np.linspace(-1, 1, package.replaceable[name].shape[0], dtype=np.float32)
        origin = Origin("memory", "0" * 64, "peft", "whole weights", "")
        session.load_adapter(name, bind(Adapter(name, {}, {name: Replacement(value)}, origin), package))
        model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints("bert")).eval()
        with torch.no_grad():
            model.get_parameter(name).copy_(torch.from_numpy(value))
            expected = model(**{key: torch.from_numpy(values) for key, values in feeds.items()}).logits.numpy()
        assert not np.allclose(session.run(None, feeds)[0], expected, atol=1e-4)
        assert_close(session.run(None, feeds, adapter=name)[0], expected)
        assert_close(fold(package, session.adapters[name]).run(None, feeds)[0], expected)
