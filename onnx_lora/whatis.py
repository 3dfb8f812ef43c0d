"""What lies at a path, told by names of files and small configs, before any library is loaded: a checkpoint, a package,
an adapter, an ONNX file. It opens no weights.

Whoever was given something else says so by `explain`: what it is, and which command takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path

from onnx_lora.errors import InputError
from onnx_lora.json_text import parse_json

__all__ = ["Thing", "explain", "what_is"]


class Thing(Enum):
    """What may lie at a path."""

    NOTHING = "nothing"
    PACKAGE = "a package of onnx-lora"
    CHECKPOINT = "a checkpoint"
    PIPELINE = "a pipeline of diffusers"
    ADAPTER = "an adapter"
    ONNX = "a folder of ONNX files"
    GENAI = "a model of ONNX Runtime GenAI"
    TOKENIZER = "a tokenizer without a model"
    FOLDER = "another folder"
    FILE = "another file"


# Endings of files by what these are.
_FILES: Mapping[str, Thing] = {
    ".onnx": Thing.ONNX,
    ".onnx_adapter": Thing.ADAPTER,
    ".gguf": Thing.ADAPTER,
}

# Bytes of a config. Of a larger one the name is not told.
_CONFIG_LIMIT = 2**20

# Of a whole model; an adapter's own files begin otherwise.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.safetensors")

# What to do with a thing where another one is wanted.
_INSTEAD: Mapping[Thing, Mapping[Thing, str]] = {
    Thing.CHECKPOINT: {
        Thing.PACKAGE: "give the checkpoint that it was made from; `quantize` and `fold` take a package",
        Thing.ADAPTER: "give its base; the adapter then goes to `fold`, `run` or `load_adapter`",
        Thing.ONNX: "`attach` gives ONNX files their points",
        Thing.GENAI: "`attach` gives ONNX files their points",
        Thing.TOKENIZER: "give the folder that holds config.json and the weights",
    },
    Thing.PACKAGE: {
        Thing.CHECKPOINT: "make a package of it first: `export`",
        Thing.PIPELINE: "make a package of it first: `export`",
        Thing.ADAPTER: "give the package there, and the adapter in its own place",
        Thing.ONNX: "make a package of them first: `attach`; what `fold` wrote is a plain model, for ONNX Runtime",
        Thing.GENAI: "make a package of it first: `attach`; what `fold` wrote is a plain model, for GenAI",
    },
    Thing.ADAPTER: {
        Thing.PACKAGE: "give an adapter there, and the package in its own place",
        Thing.CHECKPOINT: "give an adapter for it: the folder that PEFT's save_pretrained wrote",
        Thing.PIPELINE: "give an adapter for it",
        Thing.ONNX: "an adapter is a folder with adapter_config.json, or a file of weights",
        Thing.GENAI: "an adapter is a folder with adapter_config.json, or a file of weights",
    },
    Thing.ONNX: {
        Thing.PACKAGE: "it has its points already; give the ONNX file that it was made from",
        Thing.CHECKPOINT: "`export` makes a package of it",
        Thing.PIPELINE: "`export` makes a package of it",
        Thing.ADAPTER: "give the ONNX file of its base",
    },
}


def what_is(path: Path) -> Thing:
    """What lies at a path; of several things the first. What cannot be looked at is nothing."""
    return next(_all_things(path))


def explain(path: Path, wanted: Thing) -> str | None:
    """What to say of a path at which `wanted` was expected; None where it may be that, or nothing is known of it."""
    things = list(_all_things(path))
    is_wanted = wanted in things
    if is_wanted and (things[0] is wanted or things[0] is not Thing.PACKAGE):
        return None
    instead = _INSTEAD[wanted].get(things[0])
    return None if instead is None else f"is {_describe(path, things[0])}; {instead}"


def _all_things(path: Path) -> Iterator[Thing]:
    """All that a path may be taken for, at least one thing."""
    try:
        if path.is_dir():
            yield from _things_in_folder(path)
        elif path.exists():
            yield _FILES.get(path.suffix, Thing.FILE)
        else:
            yield Thing.NOTHING
    except (OSError, ValueError):
        yield Thing.NOTHING


def _things_in_folder(folder: Path) -> Iterator[Thing]:
    names = sorted(entry.name for entry in folder.iterdir())
    has_weights = any(fnmatch(name, pattern) for name in names for pattern in _WEIGHTS)
    has_graphs = any(name.endswith(".onnx") for name in names)
    if "onnx_lora.json" in names:
        yield Thing.PACKAGE
    if "adapter_config.json" in names:
        yield Thing.ADAPTER
    if "model_index.json" in names:
        yield Thing.PIPELINE
    if "config.json" in names and has_weights:
        yield Thing.CHECKPOINT
    if has_graphs and "genai_config.json" in names:
        yield Thing.GENAI
    if has_graphs:
        yield Thing.ONNX
    if "tokenizer_config.json" in names or "tokenizer.json" in names:
        yield Thing.TOKENIZER
    yield Thing.FOLDER


def _describe(path: Path, thing: Thing) -> str:
    """A thing in words, with what its config names."""
    if thing is Thing.ADAPTER and path.is_dir():
        base = _field(path / "adapter_config.json", "base_model_name_or_path")
        return f"a PEFT adapter of {base}" if base else "a PEFT adapter"
    if thing is Thing.CHECKPOINT:
        architecture = _field(path / "config.json", "architectures")
        return f"a checkpoint of {architecture}" if architecture else thing.value
    if thing is Thing.ONNX and not path.is_dir():
        return "an ONNX file"
    return str(thing.value)


def _field(file: Path, name: str) -> str:
    """A text in a config, or the first of a list; empty where there is none."""
    try:
        with file.open("rb") as opened:
            value = parse_json(opened.read(_CONFIG_LIMIT), file, InputError, what="a config").get(name)
    except (InputError, OSError):
        return ""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) else ""
