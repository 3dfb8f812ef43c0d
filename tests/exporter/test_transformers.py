"""What transformers' own exporter makes: how its graphs look, what they keep, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf
from onnx import numpy_helper

from onnx_lora import Package
from onnx_lora.errors import ModelError
from onnx_lora.exporter import export, verify
from tests.support.exporters import HAS_OPTIMUM
from tests.support.models import make_model

Make = Callable[[str], Path]

pytestmark = pytest.mark.slow
needs_it = pytest.mark.skipif(HAS_OPTIMUM, reason="needs transformers 5")


def _sizes(package: Package, graph: str = "model") -> dict[str, list[int | str]]:
    """The axes of a graph's own inputs and outputs, as its base has them."""
    proto = onnx.load(package.path / package.graph(graph).base_file, load_external_data=False).graph
    return {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*proto.input, *proto.output)
    }


@pytest.mark.skipif(not HAS_OPTIMUM, reason="needs an older transformers")
def test_an_older_transformers_is_refused_by_its_version(checkpoints: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"from 5\.24 on, and {hf.__version__} is installed"):
        export(checkpoints("llama"), tmp_path / "out", via="transformers")


@needs_it
def test_a_decoder_has_one_batch_and_a_cache_by_the_names_of_all_graphs(packages: Make) -> None:
    package = Package.open(packages("llama"))
    tokens, past = ["batch_size", "sequence_length"], ["batch_size", 2, "past_sequence_length", 8]
    present = ["batch_size", 2, "past_sequence_length + sequence_length", 8]
    sizes = _sizes(package)
    assert sizes.pop("attention_mask") == ["batch_size", "total_sequence_length"]
    layers = range(2)
    assert sizes == {
        "input_ids": tokens,
        "position_ids": tokens,
        "logits": [*tokens, 100],
        **{f"past_key_values.{layer}.{side}": past for layer in layers for side in ("key", "value")},
        **{f"present.{layer}.{side}": present for layer in layers for side in ("key", "value")},
    }
    assert all(point.per_row for point in package.points.values())
    record = package.manifest.source
    assert (record["made_by"], record["task"]) == ("transformers", "text-generation-with-past")
    assert record["transformers"] == hf.__version__


@needs_it
def test_an_encoder_and_its_decoder_are_three_graphs(packages: Make) -> None:
    package = Package.open(packages("t5"))
    names = [graph.name for graph in package.manifest.graphs]
    assert names == ["encoder_model", "decoder_model", "decoder_with_past_model"]
    source = ["batch_size", "encoder_sequence_length"]
    assert _sizes(package, names[0]) == {
        "input_ids": source,
        "attention_mask": source,
        "last_hidden_state": [*source, 32],
    }
    behind = _sizes(package, names[2])
    assert behind["encoder_attention_mask"] == source
    assert behind["past_key_values.1.decoder.value"] == ["batch_size", 4, "past_sequence_length", 8]
    assert behind["past_key_values.1.encoder.value"] == ["batch_size", 4, "encoder_sequence_length", 8]
    # What a decoder only hands on is no output of its graph.
    assert "present.1.decoder.value" in behind
    assert "present.1.encoder.value" not in behind
    assert "encoder_last_hidden_state" not in behind


@needs_it
def test_texts_and_pictures_are_two_batches(packages: Make) -> None:
    sizes = _sizes(Package.open(packages("clip")))
    assert sizes["input_ids"][0] == "batch_size"
    assert sizes["pixel_values"][:2] == ["image_batch_size", 3]


@needs_it
def test_a_task_without_a_cache_has_none(checkpoints: Make, tmp_path: Path) -> None:
    package = export(checkpoints("llama"), tmp_path / "out", via="transformers", task="text-generation")
    assert set(_sizes(package)) == {"input_ids", "attention_mask", "position_ids", "logits"}


@needs_it
def test_biases_of_zeros_stay_in_the_graph_and_in_the_model(tmp_path: Path) -> None:
    model = make_model("bert")
    assert not model.classifier.bias.any()
    model.save_pretrained(tmp_path / "base")
    package = export(tmp_path / "base", tmp_path / "out", via="transformers")
    proto = onnx.load(package.path / "base.onnx")
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            np.testing.assert_array_equal(values[name], parameter.detach().numpy())
    assert "classifier.bias" in package.replaceable


@needs_it
def test_a_model_that_reads_pictures_is_exported_for_text_alone(tmp_path: Path, caplog: Any) -> None:
    core = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.Gemma3Config(
        text_config=core | heads,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=96,
        boi_token_index=94,
        eoi_token_index=95,
    )
    torch.manual_seed(0)
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    package = export(tmp_path / "base", tmp_path / "out", via="transformers")
    assert package.manifest.source["left_out"] == "model.vision_tower, model.multi_modal_projector"
    assert "leaves out model.vision_tower" in caplog.text
    assert all("language_model" in name for name in package.points)


@needs_it
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_half_precision_is_verified(name: str, checkpoints: Make, tmp_path: Path) -> None:
    package = export(checkpoints(name), tmp_path / "out", via="transformers", precision="fp16")
    types = {
        value.name: value.type.tensor_type.elem_type for value in onnx.load(package.path / "base.onnx").graph.output
    }
    assert types["logits"] == onnx.TensorProto.FLOAT16
    assert all(entry.agrees for entry in verify(package, checkpoints(name)))


@needs_it
@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "int4"}, "transformers writes no int4"),
        ({"task": "text-clasification"}, "there is no task 'text-clasification'"),
        ({"task": "image-classification"}, "cannot be exported by transformers for task 'image-classification'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(checkpoints: Make, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        export(checkpoints("llama"), tmp_path / "out", via="transformers", **options)
    assert not (tmp_path / "out").exists()


@needs_it
def test_a_config_without_a_class_must_be_given_a_task(checkpoints: Make, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in checkpoints("bert").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    fields = json.loads((base / "config.json").read_text("utf-8"))
    del fields["architectures"]
    (base / "config.json").write_text(json.dumps(fields), "utf-8")
    with pytest.raises(ModelError, match="names no class of transformers, so the task must be given"):
        export(base, tmp_path / "out", via="transformers")
    package = export(base, tmp_path / "out", via="transformers", task="text-classification")
    assert package.manifest.source["task"] == "text-classification"
