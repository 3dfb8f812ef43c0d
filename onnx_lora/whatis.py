"""What lies at a path, told by names of files and small configs, before any library is loaded: a checkpoint, a package,
an adapter, an ONNX file. It opens no weights.

Whoever was given something else says so by `explain`: what it is, and which command takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path

from onnx_lora.errors import InputError
from onnx_lora.json_text import parse_json

__all__ = ["Found", "Thing", "explain", "what_is"]


class Thing(Enum):
    """What may lie at a path."""

    NOTHING = "nothing"
    PACKAGE = "a package of onnx-lora"
    CHECKPOINT = "a checkpoint"
    PIPELINE = "a pipeline of diffusers"
    ADAPTER = "an adapter"
    ONNX = "ONNX files"
    GENAI = "a model of ONNX Runtime GenAI"
    TOKENIZER = "a tokenizer without a model"
    FOLDER = "another folder"
    FILE = "another file"


@dataclass(frozen=True)
class Found:
    """What lies at a path. `says`: in words, with what its files name: "a PEFT adapter of org/base"."""

    thing: Thing
    says: str


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


def what_is(path: Path) -> Found:
    """What lies at a path; of several things the first. What cannot be looked at is nothing."""
    return next(_all_things(path))


def explain(path: Path, wanted: Thing) -> str | None:
    """What to say of a path at which `wanted` was expected; None where it may be that, or nothing is known of it."""
    found = list(_all_things(path))
    is_wanted = any(one.thing is wanted for one in found)
    if is_wanted and (found[0].thing is wanted or found[0].thing is not Thing.PACKAGE):
        return None
    instead = _INSTEAD[wanted].get(found[0].thing)
    return None if instead is None else f"is {found[0].says}; {instead}"


def _all_things(path: Path) -> Iterator[Found]:
    """All that a path may be taken for, at least one thing."""
    try:
        if path.is_dir():
            yield from _things_in_folder(path)
        elif path.exists():
            thing = _FILES.get(path.suffix, Thing.FILE)
            yield Found(
                thing, "an ONNX file" if thing is Thing.ONNX else f"a file {path.suffix or 'without an ending'}"
            )
        else:
            yield Found(Thing.NOTHING, "nothing")
    except (OSError, ValueError):
        yield Found(Thing.NOTHING, "nothing")


def _things_in_folder(folder: Path) -> Iterator[Found]:
    names = sorted(entry.name for entry in folder.iterdir())
    if "onnx_lora.json" in names:
        yield Found(Thing.PACKAGE, Thing.PACKAGE.value)
    if "adapter_config.json" in names:
        base = _field(folder / "adapter_config.json", "base_model_name_or_path")
        yield Found(Thing.ADAPTER, f"a PEFT adapter of {base}" if base else "a PEFT adapter")
    if "model_index.json" in names:
        yield Found(Thing.PIPELINE, Thing.PIPELINE.value)
    if "config.json" in names and any(fnmatch(name, pattern) for name in names for pattern in _WEIGHTS):
        architecture = _field(folder / "config.json", "architectures")
        yield Found(Thing.CHECKPOINT, f"a checkpoint of {architecture}" if architecture else "a checkpoint")
    has_graphs = any(name.endswith(".onnx") for name in names)
    if has_graphs and "genai_config.json" in names:
        yield Found(Thing.GENAI, Thing.GENAI.value)
    if has_graphs:
        yield Found(Thing.ONNX, "a folder of ONNX files")
    if "tokenizer_config.json" in names or "tokenizer.json" in names:
        yield Found(Thing.TOKENIZER, Thing.TOKENIZER.value)
    yield Found(Thing.FOLDER, "a folder")


def _field(file: Path, name: str) -> str:
    """A text in a config, or the first of a list; empty where there is none."""
    try:
        with file.open("rb") as opened:
            value = parse_json(opened.read(_CONFIG_LIMIT), file, InputError, what="a config").get(name)
    except (InputError, OSError):
        return ""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) else ""
