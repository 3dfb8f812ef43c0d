"""A checkpoint's `config.json`, read once and handed on to whoever asks what the model is. It reads no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from onnx_lora.companions import check_folder
from onnx_lora.errors import ModelError
from onnx_lora.exporter.frontends.configs.hub import check_name, fetch_file, find_revision
from onnx_lora.exporter.frontends.configs.names import base_of_fields, name_of
from onnx_lora.exporter.frontends.configs.newer import open_readable, translate_config
from onnx_lora.exporter.frontends.failures import library_failures
from onnx_lora.json_file import read_json

__all__ = ["ModelConfig"]

_CONFIG = "config.json"

# Folders of a pipeline that hold a network each; some are in every pipeline.
_NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae")


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint says of its model. `model`: the folder or the hub id, as the user gave it; `fields`: its
    `config.json`, as it is written."""

    model: str | os.PathLike[str]
    fields: Mapping[str, Any]

    @staticmethod
    def read(model: str | os.PathLike[str]) -> ModelConfig:
        """Of any architecture, from a local folder or the hub; `ORG/NAME@REVISION` is a revision there.

        Raises ModelError: there is no config, it is no JSON, or the folder is a network of a pipeline, or holds
        networks without the pipeline's index. MissingDependencyError: transformers is not installed.
        """
        check_name(model)
        model = find_revision(model)
        folder = Path(model)
        if not folder.is_dir():
            return ModelConfig(model, _read_from_hub(str(model)))
        check_folder(folder, ModelError)
        fields = read_json(folder / _CONFIG, ModelError) if (folder / _CONFIG).is_file() else {}
        _refuse_networks(folder, fields)
        if not fields:
            raise ModelError(f"must hold a {_CONFIG}, and has none", path=model)
        return ModelConfig(model, fields)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder here, and no model of the hub."""
        return Path(self.model).is_dir()

    @property
    def name(self) -> str:
        """What a manifest calls it: the folder's own name or the hub id."""
        return name_of(self.model)

    @property
    def base(self) -> dict[str, str]:
        """`base`, for a manifest, where the name does not say it already."""
        return base_of_fields(self.model, self.fields)

    @property
    def architecture(self) -> str:
        """The class of transformers that the config names first, or nothing."""
        named = self.fields.get("architectures")
        first = named[0] if isinstance(named, list) and named else ""
        return first if isinstance(first, str) else ""

    @property
    def layers(self) -> int:
        """How many layers the model has, or 0 where the config does not say it."""
        layers = self.fields.get("num_hidden_layers")
        return layers if isinstance(layers, int) else 0

    @cached_property
    def translated(self) -> Mapping[str, Any]:
        """The fields as the installed transformers must be told to compute the same.

        Raises ModelError: they say what the installed transformers does not understand.
        """
        with library_failures(self.model, "read"):
            return translate_config(self.fields, self.model)

    @contextmanager
    def open_readable(self) -> Iterator[str | os.PathLike[str]]:
        """What transformers reads in place of the checkpoint, for as long as the block runs: itself, or a folder of
        the same files with translated configs.

        Raises ModelError: a config says what the installed transformers does not understand.
        """
        with ExitStack() as stack:
            with library_failures(self.model, "read"):
                read = stack.enter_context(open_readable(self.model, self.fields))
            yield read


def _read_from_hub(model: str) -> dict[str, Any]:
    file = fetch_file(model, _CONFIG)
    if file is None:
        raise ModelError(f"must hold a {_CONFIG}, and has none", path=model)
    return read_json(file, ModelError)


def _refuse_networks(folder: Path, fields: Mapping[str, Any]) -> None:
    """Raises ModelError: the folder is a part of a pipeline, or a pipeline that lost its index."""
    if "_diffusers_version" in fields:
        raise ModelError(
            f"is one network of a pipeline ({fields.get('_class_name')}); give the folder of the whole pipeline, the "
            "one with model_index.json",
            path=folder,
        )
    networks = [name for name in _NETWORKS if (folder / name / _CONFIG).is_file()]
    if networks and not fields:
        raise ModelError(
            f"holds {', '.join(networks)} and no model_index.json; a pipeline must have one, as save_pretrained "
            "writes it",
            path=folder,
        )
