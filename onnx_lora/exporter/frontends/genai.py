"""A causal language model's checkpoint, made a graph by ONNX Runtime GenAI's model builder: GroupQueryAttention,
packed q/k/v, weights of 4 or 8 bits; it runs in `onnxruntime_genai` too."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lora.errors import ExportError
from onnx_lora.exporter.checkpoint import Checkpoint
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.genai_builder import NoTokenizer, Wish, build_graph, builder_version
from onnx_lora.exporter.frontends.huggingface import (
    base_of,
    config_of,
    heads_of,
    name_of,
    quiet,
    translated,
    without_bars,
)
from onnx_lora.exporter.frontends.newer import readable
from onnx_lora.exporter.frontends.source import Loaded, Precision, Reference, companions_of
from onnx_lora.exporter.frontends.whole import LOADING, check_whole
from onnx_lora.exporter.graph_files import GraphFile
from onnx_lora.exporter.options import Progress
from onnx_lora.points import Array

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_checkpoint", "load_causal_model", "references"]

logger = logging.getLogger(__name__)

# One of these is in every folder with a tokenizer.
_TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe")

# What a graph is compared on: rows of equal length, because GroupQueryAttention knows no padding on the left.
_ROWS, _LENGTH = 2, 6

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def build_checkpoint(
    model: str | os.PathLike[str], folder: Path, *, precision: Precision, progress: Progress
) -> tuple[Loaded, nn.Module]:
    """Let the builder write the graph of a local folder or a hub id into `folder`; the torch model beside it.

    Weights of 4 and 8 bits are symmetric, in blocks of `precision.block_size` along the inputs.
    `accuracy_level` 4 multiplies them in int8: activations are quantized as well, block by block, as they come.

    Raises ModelError: no such checkpoint, or the builder does not know its architecture. ExportError: the
    builder failed. StorageError, MissingDependencyError.
    """
    config = config_of(model)
    layers = config.get("num_hidden_layers")
    built = folder / "built"
    try:
        with readable(model) as read:
            wish = Wish(model, built, precision, layers if isinstance(layers, int) else 0, read)
            build_graph(wish, folder, progress)
    except NoTokenizer as error:
        local = Path(model)
        if not local.is_dir() or any(any(local.glob(pattern)) for pattern in _TOKENIZERS):
            raise ExportError(f"its tokenizer cannot be loaded by transformers: {error}", path=model) from error
        logger.warning("%s has no tokenizer, and the package will have none", name_of(model))
    progress("load the checkpoint", 0, 1)
    # Only now: the builder had it in memory too.
    torch_model = load_causal_model(model, precision=precision.name)
    checkpoint = Checkpoint.of_module(torch_model, heads=heads_of(torch_model))
    origin = {
        "made_by": "genai",
        "from": name_of(model),
        "task": "text-generation-with-past",
        "precision": precision.name,
        "builder": f"onnxruntime-genai {builder_version()}",
    } | base_of(model)
    if precision.quantized:
        origin |= {"block_size": str(precision.block_size), "accuracy_level": str(precision.accuracy_level)}
    with translated(model, "run"):
        calls = count_calls(torch_model, {part.graph: part.answer for part in references(torch_model)})
    sources = (GraphFile("model", built / "model.onnx", calls=calls["model"]),)
    return Loaded(sources, origin, checkpoint, _companions(model, built, torch_model), folder), torch_model


def load_causal_model(model: str | os.PathLike[str], *, precision: str) -> nn.Module:
    """The torch model that the builder would export; weights that it quantizes are as they were before.

    Raises ModelError: no such checkpoint. MissingDependencyError: torch or transformers is not installed.
    """
    with quiet(), translated(model, "loaded by transformers"), without_bars(), readable(model) as read:
        import torch
        import transformers

        loaded, account = transformers.AutoModelForCausalLM.from_pretrained(
            str(read),
            torch_dtype=torch.float16 if precision == "fp16" else torch.float32,
            local_files_only=Path(read).is_dir(),
            trust_remote_code=False,
            # The others leave out what some models have (Gemma 2's soft caps, GPT-OSS's sinks).
            attn_implementation="eager",
            **LOADING,
        )
        check_whole(loaded, account, model, read)
    evaluated: nn.Module = loaded.eval()
    return evaluated


def _companions(model: str | os.PathLike[str], built: Path, torch_model: Any) -> tuple[Path, ...]:
    """The builder's files, and those of the checkpoint that it leaves out: its configs above all."""
    others = built / "others"
    if not Path(model).is_dir():
        torch_model.config.save_pretrained(others)
        if torch_model.generation_config is not None:
            torch_model.generation_config.save_pretrained(others)
    files = {file.name: file for file in companions_of(others if not Path(model).is_dir() else Path(model))}
    return tuple((files | {file.name: file for file in companions_of(built)}).values())


def references(model: Any) -> list[Reference]:
    """A prompt and an empty cache, and what the model answers to them."""
    import torch

    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, vocabulary, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))

    def answer() -> dict[str, Array]:
        with quiet(), torch.inference_mode():
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        flat: dict[str, Array] = {"logits": outputs.logits.numpy()}
        for index, layer in enumerate(outputs.past_key_values.layers):
            flat |= {f"present.{index}.key": layer.keys.numpy(), f"present.{index}.value": layer.values.numpy()}
        return flat

    first = cache(answer)  # for its shapes: adapters change values only

    def feeds(names: Sequence[str]) -> dict[str, Array]:
        present = first()
        values: dict[str, Array] = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((_ROWS, _LENGTH), np.int64),
            "position_ids": np.tile(np.arange(_LENGTH), (_ROWS, 1)),
        }
        for name in names:
            if match := _PAST.fullmatch(name):
                # [rows, heads, length, size], and nothing has passed yet.
                values[name] = present[f"present.{match[1]}.{match[2]}"][:, :, :0]
        return {name: values[name] for name in names if name in values}

    return [Reference("model", feeds, answer)]
