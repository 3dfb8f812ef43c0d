"""A GGUF LoRA file out of an adapter, as llama.cpp reads it. One alpha counts for all modules there, and so what a
module's scale is more or less than alpha / r goes into B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lora.adapters.adapter import Delta, PortableAdapter
from onnx_lora.adapters.formats.gguf.architectures import ARCHITECTURES, HEADS, MODEL_TYPES, Architecture
from onnx_lora.adapters.formats.gguf.rows import count_heads, rows_interleaved
from onnx_lora.adapters.formats.writing import refuse_writing, rescale
from onnx_lora.adapters.problems import TensorError
from onnx_lora.adapters.scale import lora_scale
from onnx_lora.errors import MissingDependencyError, UnsupportedAdapterError
from onnx_lora.kinds import Conv, Embedding
from onnx_lora.points import Array

__all__ = ["write_gguf"]


def write_gguf(adapter: PortableAdapter, file: Path, config: Mapping[str, Any]) -> None:
    """`config`: Hugging Face's, of the model.

    Raises UnsupportedAdapterError: a model that is not known here, DoRA, convolutions, whole weights, modules that
    llama.cpp has no name for. MissingDependencyError: no `gguf` package.
    """
    name = _architecture(config, adapter)
    problems = [f"{parameter}: is a whole weight" for parameter in adapter.replacements]
    tensors: dict[str, Array] = {}
    alpha = _common_alpha(adapter)
    for module, delta in adapter.deltas.items():
        own_name = ARCHITECTURES[name].from_module(module)
        if delta.magnitude is not None:
            problems.append(f"{module}: has DoRA, which llama.cpp would ignore")
        elif isinstance(delta.kind, Conv) or own_name is None:
            problems.append(f"{module}: is no module that llama.cpp has a name for in {name} models")
        else:
            scaled = rescale(delta, lora_scale(alpha, delta.rank))
            try:
                tensors |= _tensors(own_name, scaled, ARCHITECTURES[name], config)
            except TensorError as error:
                problems.append(f"{module}: {error}")
    refuse_writing(adapter, "a GGUF file", problems)
    _write(file, name, alpha, tensors, config)


def _common_alpha(adapter: PortableAdapter) -> float:
    """The alpha that most modules have; 1 where there is none, or it is 0, which llama.cpp takes for none."""
    alphas = [delta.scale * delta.rank for delta in adapter.deltas.values()]
    return max(alphas, key=alphas.count, default=1.0) or 1.0


def _architecture(config: Mapping[str, Any], adapter: PortableAdapter) -> str:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        found = f"is {kind!r}" if kind else "no config.json of a package says which it is (`package=...`)"
        raise UnsupportedAdapterError(
            f"the model of a GGUF file must be one of {', '.join(MODEL_TYPES)}, and {found}", path=adapter.origin.path
        )
    return MODEL_TYPES[kind]


def _tensors(name: str, delta: Delta, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Array]:
    """In llama.cpp's layout: `lora_a` `[r, in]`, of a table `[rows, r]`; `lora_b` `[out, r]`.

    Raises TensorError: the order of the rows needs a number of heads, and the config does not say it.
    """
    b = delta.b
    heads = architecture.heads_of(name)
    if heads is not None:
        count = count_heads(config, heads)
        if count < 1 or len(b) % (2 * count):
            raise TensorError(f"the package's config.json must say {heads}, a number that {len(b)} outputs are made of")
        b = rows_interleaved(b, count)
    a = delta.a.T if isinstance(delta.kind, Embedding) else delta.a
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}


def _write(file: Path, name: str, alpha: float, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> None:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF files are written with the gguf package: `pip install onnx-lora[gguf]`"
        ) from error
    writer = gguf.GGUFWriter(str(file), name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, field in HEADS.items():
        if type(config.get(key)) is int:
            writer.add_uint32(field.format(name), config[key])
    for tensor, values in tensors.items():
        kind = np.float16 if values.dtype == np.float16 else np.float32
        writer.add_tensor(tensor, np.ascontiguousarray(values, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
