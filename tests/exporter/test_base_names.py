"""What the manifest calls the model that a package was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnx_lora.exporter import OnnxFiles
from onnx_lora.exporter.frontends.configs.names import base_of, short_name


@pytest.mark.parametrize(
    "named, short",
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gpt2", "gpt2"),
        ("/home/somebody/models/gpt2", "gpt2"),
        ("../somebody/gpt2", "gpt2"),
        ("~/gpt2", "gpt2"),
        ("C:\\Users\\somebody\\gpt2", "gpt2"),
    ],
)
def test_a_hub_id_is_kept_and_of_a_path_the_end(named: str, short: str) -> None:
    assert short_name(named) == short


def test_a_hub_id_needs_no_other_name() -> None:
    assert base_of("meta-llama/Llama-3.1-8B") == {}


def test_a_folder_is_called_as_its_config_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "org/tiny"}), "utf-8")
    assert base_of(tmp_path) == {"base": "org/tiny"}


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", json.dumps({"_name_or_path": 3}), "\udcff"])
def test_a_config_without_a_name_gives_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert base_of(tmp_path) == {}


def test_a_folder_of_the_hubs_cache_is_called_as_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--tiny-model" / "snapshots" / "0a1b2c"
    folder.mkdir(parents=True)
    assert base_of(folder) == {"base": "org/tiny-model"}


def _record(file: Path) -> dict[str, str]:
    return OnnxFiles(file).load(file.parent, lambda *_: None).record


def test_an_attached_file_is_of_the_model_that_its_config_or_its_checkpoint_names(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "base" not in _record(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "org/tiny"}), "utf-8")
    assert _record(tmp_path / "model.onnx")["base"] == "org/tiny"
