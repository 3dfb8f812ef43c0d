"""A causal language model's checkpoint, made a graph by ONNX Runtime GenAI's model builder: GroupQueryAttention,
packed q/k/v, weights of 4 or 8 bits; it runs in `onnxruntime_genai` too."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_lora.exporter.foreign_libraries import attempt
from onnx_lora.exporter.frontends.calls import count_calls
from onnx_lora.exporter.frontends.companion_files import companions_of
from onnx_lora.exporter.frontends.configs.model_config import ModelConfig
from onnx_lora.exporter.frontends.configs.whole import LOADING, check_whole
from onnx_lora.exporter.frontends.exporters.genai_builder import (
    Wish,
    build_graph,
    builder_version,
    knows_architecture,
)
from onnx_lora.exporter.frontends.exporters.genai_tokenizer import has_tokenizer, with_some_tokenizer
from onnx_lora.exporter.frontends.exporters.registry import ExportRequest, Refusal
from onnx_lora.exporter.frontends.failures import library_failures
from onnx_lora.exporter.frontends.huggingface import heads_of
from onnx_lora.exporter.frontends.language_part import find_text_class, language_part_of
from onnx_lora.exporter.frontends.quiet import quiet, without_bars
from onnx_lora.exporter.frontends.source import Loaded, Original, Reference
from onnx_lora.exporter.frontends.versions import versions_of
from onnx_lora.exporter.request import GraphFile
from onnx_lora.exporter.weights.torch_weights import read_module_weights

if TYPE_CHECKING:
    from torch import nn

    from onnx_lora.exporter.request import Progress
    from onnx_lora.package import Package
    from onnx_lora.points import Array

__all__ = ["EXPORTER", "MEASURED", "GenaiExporter", "load_causal_model", "references"]

logger = logging.getLogger(__name__)

# The architectures of onnxruntime-genai 0.18 whose fp32 graph was found equal to PyTorch's numbers on the CPU. The
# builder takes more, and is asked when told to; of OLMo it takes the wrong norm, of Phi and Nemotron a wrong epsilon.
MEASURED = frozenset(
    {
        "Ernie4_5ForCausalLM",
        "Gemma2ForCausalLM",
        "GemmaForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SmolLM3ForCausalLM",
    }
)

# Why the builder fails on an architecture that it names.
_FAILING = {
    "Gemma3ForCausalLM": "reads rotary positions of one kind, and transformers 5 has one for each kind of layer"
}

# Layers whose cache is keys and values, and all whose caches are known here.
_OF_KEYS = ("full_attention", "sliding_attention", "chunked_attention")
_LAYERS = (*_OF_KEYS, "conv")

# What the builder exports for, by Optimum's names; None: what the config says. Its graphs always have a cache.
_TASKS = (None, "text-generation-with-past", "causal-lm-with-past")

# What a package's manifest calls its task.
_TASK = "text-generation-with-past"

# GroupQueryAttention's kernels rotate and multiply this many numbers at once.
_LANES = 16

_INSTALL = "pip install 'onnx-lora[export,genai,cpu]'"
_INSTEAD = 'export it with `via="transformers"`, in fp32 or fp16; `quantize` makes 8 or 4 bits of that'

# What a graph is compared on: rows of equal length, because GroupQueryAttention knows no padding on the left.
_ROWS, _LENGTH = 2, 6

_PAST_CONV = re.compile(r"past\.\d+\.conv")
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class GenaiExporter:
    """ONNX Runtime GenAI's model builder."""

    name = "genai"

    def accepts(self, request: ExportRequest) -> Refusal | None:
        """Why it does not take the request, or None. Unless it is asked for, or for quantized weights, which nobody
        else writes, it takes the architectures alone whose numbers were measured.

        Raises ModelError: the config says what the installed transformers does not understand.
        """
        is_needed = request.via == self.name or request.precision.quantized
        if request.task not in _TASKS:
            task = f"the task is {request.task!r}"
            return Refusal(f"{_wanted(request)} is for {_TASK}, and {task}; {_INSTEAD}")
        if not _is_installed():
            return Refusal(f"{_wanted(request)} needs onnxruntime-genai", install=_INSTALL)
        unknown = "the GenAI builder does not know the architecture {}; " + _INSTEAD
        if not _has_configs_within(request.config) and not knows_architecture(request.config.architecture):
            return Refusal(unknown.format(request.config.architecture))  # before transformers is loaded
        architecture, fields = _language_model(request.config)
        if not knows_architecture(architecture):
            return Refusal(unknown.format(architecture))
        if architecture in _FAILING:
            return Refusal(f"the GenAI builder {_FAILING[architecture]}; {_INSTEAD}")
        layers = fields.get("layer_types")
        others = [kind for kind in layers if kind not in _LAYERS] if isinstance(layers, list) else []
        if others:
            return Refusal(f"{_wanted(request)} is for layers of attention, and there is {others[0]}; {_INSTEAD}")
        if not is_needed and architecture not in MEASURED:
            return Refusal(f"its graph of {architecture or 'this model'} was not measured")
        if not is_needed and "quantization_config" in request.config.fields:
            # The builder unpacks weights that are quantized already, and nobody here does, to compare with.
            return Refusal("its weights are quantized already, and there is nothing to compare them with")
        if not is_needed and fields.get("eos_token_id") is None and not _has_tokenizer(request.config):
            return Refusal("the builder needs a token that ends texts, and the config says none")
        problem = _unfit_heads(fields)
        if problem is not None:
            return Refusal(f"{_wanted(request)}: {problem}; {_INSTEAD}")
        return None

    def python(self) -> str | None:
        return None

    def load(self, request: ExportRequest, folder: Path, progress: Progress) -> Loaded:
        """Let the builder write the graph into `folder`; the torch model beside it.

        Weights of 4 and 8 bits are symmetric, in blocks of `block_size` along the inputs. `accuracy_level` 4
        multiplies them in int8: activations are quantized as well, block by block, as they come.

        Raises ModelError: no such checkpoint, or the builder does not know its architecture. ExportError: the
        builder failed. StorageError, MissingDependencyError.
        """
        config, precision = request.config, request.precision
        built, language = folder / "built", folder / "language"
        record = {
            "made_by": self.name,
            "from": config.name,
            "task": _TASK,
            "precision": precision.name,
            "builder": f"onnxruntime-genai {builder_version()}",
        }
        record |= config.base | versions_of("transformers")
        with config.open_readable() as read:
            if _larger_class(config) is not None:
                record |= _save_language_part(config, read, precision.name, language)
            built_from = language if language.is_dir() else read
            with _tokenizer_beside(built_from, folder, built) as whole:
                build_graph(Wish(config.model, built, precision, config.layers, whole), folder, progress)
            progress("load the checkpoint", 0, 1)
            # Only now: the builder had it in memory too.
            model, untrained = _load(config, read, precision.name)
        if precision.quantized:
            record |= {"block_size": str(precision.block_size), "accuracy_level": str(precision.accuracy_level)}
        with library_failures(config.model, "run"):
            calls = count_calls(model, {part.graph: part.answer for part in references(model)})
        return Loaded(
            graphs=(GraphFile("model", built / "model.onnx", calls=calls["model"]),),
            record=record,
            weights=read_module_weights(model, heads=heads_of(model)),
            companions=_companions(config, language, built, model),
            scratch=folder,
            original=Original(model, partial(references, model)),
            untrained=untrained,
        )

    def load_original(self, request: ExportRequest, package: Package) -> Original:  # noqa: ARG002 - others need it
        """The torch model that the builder would export. Raises ModelError, MissingDependencyError."""
        with request.config.open_readable() as read:
            model, _ = _load(request.config, read, request.precision.name)
        return Original(model, partial(references, model))


EXPORTER = GenaiExporter()


@contextmanager
def _tokenizer_beside(
    checkpoint: str | os.PathLike[str], scratch: Path, built: Path
) -> Iterator[str | os.PathLike[str]]:
    """What the builder reads: the checkpoint, with some tokenizer where it has none."""
    folder = Path(checkpoint)
    if not folder.is_dir() or has_tokenizer(folder):
        yield checkpoint
        return
    logger.warning("%s has no tokenizer, and the package will have none", folder.resolve().name)
    with with_some_tokenizer(folder, scratch / "read", built) as whole:
        yield whole


def load_causal_model(model: str | os.PathLike[str], *, precision: str) -> nn.Module:
    """The torch model that the builder would export; weights that it quantizes are as they were before.

    Raises ModelError: no such checkpoint. MissingDependencyError: torch or transformers is not installed.
    """
    config = ModelConfig.read(model)
    with config.open_readable() as read:
        return _load(config, read, precision)[0]


def _load(config: ModelConfig, read: str | os.PathLike[str], precision: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and its parameters that the checkpoint lacks."""
    with quiet(), library_failures(config.model, "loaded by transformers"), without_bars():
        import torch
        import transformers

        kind = getattr(transformers, _larger_class(config) or "AutoModelForCausalLM")
        loaded, account = kind.from_pretrained(
            str(read),
            torch_dtype=torch.float16 if precision == "fp16" else torch.float32,
            local_files_only=Path(read).is_dir(),
            trust_remote_code=False,
            # The others leave out what some models have (Gemma 2's soft caps, GPT-OSS's sinks).
            attn_implementation="eager",
            **LOADING,
        )
        untrained = check_whole(loaded, account, config.model, read)
    evaluated: nn.Module = loaded.eval()
    return evaluated, untrained


def _language_model(config: ModelConfig) -> tuple[str, Mapping[str, Any]]:
    """The class of transformers whose graph is built, and its config: the checkpoint's own, or those of the language
    model within. Raises ModelError: see `ModelConfig.translated`."""
    theirs = _read_as_theirs(config)
    text_class = None if theirs is None else find_text_class(theirs)
    if theirs is None or text_class is None:
        return config.architecture, config.translated
    return text_class, theirs.get_text_config(decoder=True).to_dict()


def _larger_class(config: ModelConfig) -> str | None:
    """The class of a checkpoint that reads pictures or speech too, whose language model is built alone; None: it is of
    another sort."""
    theirs = _read_as_theirs(config)
    if theirs is None or find_text_class(theirs) is None:
        return None
    return str(theirs.architectures[0])


def _has_configs_within(config: ModelConfig) -> bool:
    """Whether a config holds those of its parts, as that of a model with a language model within does."""
    within = [name for name in config.fields if name.endswith("_config") and name != "quantization_config"]
    return any(isinstance(config.fields[name], Mapping) for name in within)


def _read_as_theirs(config: ModelConfig) -> Any:
    """transformers' own object of a config with others within; None where it has none, or is no model's that
    transformers knows."""
    if not _has_configs_within(config):
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.translated.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    with quiet(), library_failures(config.model, "read"):
        return CONFIG_MAPPING[kind].from_dict(dict(config.translated))


def _save_language_part(
    config: ModelConfig, read: str | os.PathLike[str], precision: str, folder: Path
) -> dict[str, str]:
    """Write the language model of a larger one into `folder`, with its tokenizer, as a checkpoint that the builder
    reads. Gives what the manifest says of it. Raises ModelError: see `language_part_of`."""
    with quiet(), library_failures(config.model, "saved by transformers"):
        whole, _ = _load(config, read, precision)
        part = language_part_of(whole, config.model)
        part.model.save_pretrained(folder)
        if config.is_local:
            for file in companions_of(Path(config.model)):
                if not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)
        else:
            attempt(partial(_save_tokenizer, read, folder))  # of which the builder says that there is none
    return part.as_record(config.name)


def _save_tokenizer(read: str | os.PathLike[str], folder: Path) -> None:
    import transformers

    transformers.AutoTokenizer.from_pretrained(str(read), trust_remote_code=False).save_pretrained(folder)


def references(model: Any) -> list[Reference]:
    """A prompt and an empty cache, and what the model answers to them."""
    import torch
    import transformers

    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, vocabulary, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))

    layers = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    has_others = not set(layers) <= set(_OF_KEYS)

    def answer() -> dict[str, Array]:
        with quiet(), torch.inference_mode():
            # Every layer keeps all that it saw, those with a window too.
            kept = transformers.DynamicCache(config=model.config) if has_others else transformers.DynamicCache()
            given = {_name_of_cache(model): kept}
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **given)
        flat: dict[str, Array] = {"logits": outputs.logits.numpy()}
        for index, layer in enumerate(outputs[_name_of_cache(model)].layers):
            if hasattr(layer, "keys"):
                flat[f"present.{index}.key"] = layer.keys.numpy()
                flat[f"present.{index}.value"] = layer.values.numpy()
            else:
                # The builder's graphs keep what the next token's convolution needs; torch keeps one token more.
                flat[f"present.{index}.conv"] = layer.conv_states[0][..., 1:].numpy()
        return flat

    first = cache(answer)  # for its shapes: adapters change values only

    def feeds(names: Sequence[str]) -> dict[str, Array]:
        values: dict[str, Array] = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((_ROWS, _LENGTH), np.int64),
            "position_ids": np.tile(np.arange(_LENGTH), (_ROWS, 1)),
        }
        for name in names:
            match = _PAST.fullmatch(name)
            if match:
                # [rows, heads, length, size], and nothing has passed yet.
                values[name] = first()[f"present.{match[1]}.{match[2]}"][:, :, :0]
            elif _PAST_CONV.fullmatch(name):
                values[name] = np.zeros_like(first()[name.replace("past", "present", 1)])
        return {name: values[name] for name in names if name in values}

    return [Reference("model", feeds, answer)]


def _name_of_cache(model: Any) -> str:
    """What a model calls its cache: before transformers 5 otherwise."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _wanted(request: ExportRequest) -> str:
    """What of a request brings it here, for messages."""
    if request.via is None and request.precision.quantized:
        return f"precision {request.precision.name!r}"
    return '`via="genai"`'


def _is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime_genai") is not None


def _has_tokenizer(config: ModelConfig) -> bool:
    """Whether a folder has one; of hub ids it is assumed."""
    return not config.is_local or has_tokenizer(Path(config.model))


def _unfit_heads(fields: Mapping[str, Any]) -> str | None:
    """Why ONNX Runtime's attention refuses a model's heads, or None; unknown configs are the builder's to judge."""
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        return None
    size = fields.get("head_dim") or width // heads
    rotated = int(size * (fields.get("partial_rotary_factor") or 1.0))
    if size % _LANES or rotated % _LANES:
        return f"attention heads must have a multiple of {_LANES} numbers, rotated ones too, and have {size}"
    return None


def _companions(config: ModelConfig, language: Path, built: Path, model: Any) -> tuple[Path, ...]:
    """The builder's files, and those of the checkpoint that it leaves out: its configs above all. `language`: the
    checkpoint of the language model, where that alone was built."""
    checkpoint = Path(config.model)
    if not config.is_local:
        checkpoint = built / "others"
        model.config.save_pretrained(checkpoint)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(checkpoint)
    files: dict[str, Path] = {}
    for folder in (checkpoint, language, built):
        if folder.is_dir():
            files |= {file.name: file for file in companions_of(folder)}
    return tuple(files.values())
